//! `VBoxSVC.log`: the service's log, with the logs of earlier runs beside it as `VBoxSVC.log.1` and so on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

/// Old logs that are kept.
const HISTORY: u32 = 10;
/// A log that grows beyond this is closed and a new one begun.
const MAX_SIZE: u64 = 4 << 20;

struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Makes room for a new log at `path`; the oldest goes.
fn rotate(path: &Path) {
    for number in (1..HISTORY).rev() {
        let _ = fs::rename(numbered(path, number), numbered(path, number + 1));
    }
    let _ = fs::rename(path, numbered(path, 1));
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.size > MAX_SIZE {
            rotate(&self.path);
            self.file = create(&self.path)?;
            self.size = 0;
        }
        let written = self.file.write(bytes)?;
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Begins the log in `config_dir`. `BOXWOOD_LOG` sets the levels: `debug`, or `vboxsvc=trace,main_api=debug`.
pub(crate) fn init(config_dir: &Path) -> io::Result<()> {
    let path = config_dir.join("VBoxSVC.log");
    rotate(&path);
    let log = LogFile { file: create(&path)?, path, size: 0 };
    let levels = std::env::var("BOXWOOD_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let levels = levels.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let format = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(Mutex::new(log));
    let _ = tracing_subscriber::registry().with(levels).with(format).try_init();
    std::panic::set_hook(Box::new(|info| tracing::error!(%info, "panic")));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_old_logs_are_kept() {
        let dir = std::env::temp_dir().join(format!("boxwood-svc-log-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("VBoxSVC.log");
        for run in 0..15 {
            rotate(&path);
            fs::write(&path, run.to_string()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "14");
        assert_eq!(fs::read_to_string(numbered(&path, 1)).unwrap(), "13");
        assert_eq!(fs::read_to_string(numbered(&path, 10)).unwrap(), "4");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 11);
        fs::remove_dir_all(&dir).unwrap();
    }
}
