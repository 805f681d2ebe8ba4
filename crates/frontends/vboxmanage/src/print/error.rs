//! Errors as VirtualBox prints them.

use std::io::Write;
use std::panic::Location;

use main_api::ApiError;

/// At this length of the synopsis the error is repeated below it, since it has scrolled away.
const LONG_USAGE_LINES: usize = 16;

/// Standard error: shows the logo at most once.
#[derive(Default)]
pub struct Stderr {
    logo_shown: bool,
}

impl Stderr {
    pub fn logo(&mut self) {
        if !self.logo_shown {
            self.logo_shown = true;
            self.put(&super::logo());
        }
    }

    /// `VBoxManage: error: ` before every line.
    pub fn error(&mut self, text: &str) {
        self.put(&prefixed(text));
    }

    /// An error and the synopsis.
    pub fn syntax(&mut self, text: &str, usage: &str) {
        self.put(&syntax(text, usage));
    }

    /// An error of the Main API with its details and where it came up.
    pub fn api(&mut self, error: &ApiError, context: &str, location: &Location<'_>) {
        self.put(&api(error, context, location.file(), location.line()));
    }

    /// Anything else that belongs to standard error.
    pub fn put(&mut self, text: &str) {
        // Nowhere is left to report to if this fails.
        let mut err = std::io::stderr().lock();
        let _ = err.write_all(text.as_bytes());
        let _ = err.flush();
    }
}

fn prefixed(text: &str) -> String {
    text.lines().map(|line| format!("VBoxManage: error: {line}\n")).collect()
}

fn syntax(text: &str, usage: &str) -> String {
    let error = prefixed(text);
    let again = if usage.lines().count() >= LONG_USAGE_LINES { format!("\n{error}") } else { String::new() };
    format!("{error}\n{usage}{again}")
}

fn api(error: &ApiError, context: &str, file: &str, line: u32) -> String {
    let mut text = String::new();
    if !error.text.is_empty() {
        text.push_str(error.text.trim_end());
        text.push('\n');
    }
    let callee = if error.component.is_empty() { "" } else { ", callee nsISupports" };
    text.push_str(&format!("Details: {}{callee}\n", error.details()));
    let file = file.rsplit('/').next().unwrap_or(file);
    text.push_str(&format!("Context: \"{context}\" at line {line} of file {file}\n"));
    prefixed(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_error_has_three_lines() {
        let error = ApiError::not_found("Could not find a registered machine named 'x'").on("IVirtualBox");
        assert_eq!(
            api(&error, "FindMachine(x)", "src/exec/machine.rs", 7),
            "VBoxManage: error: Could not find a registered machine named 'x'\n\
             VBoxManage: error: Details: code VBOX_E_OBJECT_NOT_FOUND (0x80bb0001), component VirtualBoxWrap, \
             interface IVirtualBox, callee nsISupports\n\
             VBoxManage: error: Context: \"FindMachine(x)\" at line 7 of file machine.rs\n"
        );
    }

    #[test]
    fn every_line_of_a_long_text_is_an_error_line() {
        let text = api(&ApiError::fail("one\ntwo\n").on("IMachine"), "c", "f.rs", 1);
        assert!(text.lines().all(|line| line.starts_with("VBoxManage: error: ")), "{text}");
        assert_eq!(text.lines().count(), 4);
    }

    #[test]
    fn a_long_synopsis_has_the_error_on_both_sides() {
        assert_eq!(syntax("bad", "Usage\n"), "VBoxManage: error: bad\n\nUsage\n");
        let long = "x\n".repeat(16);
        assert_eq!(
            syntax("bad", &long),
            format!("VBoxManage: error: bad\n\n{long}\nVBoxManage: error: bad\n")
        );
    }
}
