//! Text for people and programs. Everything here takes plain data and has no side effects but writing.

use std::io::{self, Write};

use vbox_types::version::{REVISION, VERSION};

pub mod appliance;
pub mod error;
pub mod fmt;
pub mod guest;
pub mod hex;
pub mod list;
pub mod medium;
pub mod networks;
pub mod progress;
pub mod vminfo;

/// The program's own name.
pub const PRODUCT: &str = vbox_types::version::PRODUCT;

/// The version, as clients take it apart: `7.0.20r163906`.
pub fn version() -> String {
    format!("{VERSION}r{REVISION}")
}

/// The lines that stand above help and syntax errors.
pub fn logo() -> String {
    format!(
        "{PRODUCT} Command Line Management Interface Version {VERSION}\n\
         Copyright (C) 2026 The {PRODUCT} authors\n\n"
    )
}

/// Writes `text` to standard output; the exit status of having done so.
pub fn stdout(text: &str) -> u8 {
    stdout_bytes(text.as_bytes())
}

/// [`stdout`] for what need not be text.
pub fn stdout_bytes(bytes: &[u8]) -> u8 {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => 0,
        // A reader that has seen enough is no failure of ours to report.
        Err(_) => 1,
    }
}

/// Compares `text` with a file of `testdata`. With `BLESS` in the environment the file is written instead; read the
/// difference before you commit it.
#[cfg(test)]
fn golden(name: &str, text: &str) {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&file, text).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    for (i, (found, wanted)) in text.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, wanted, "{name}, line {}", i + 1);
    }
    assert_eq!(text, expected, "{name}");
}
