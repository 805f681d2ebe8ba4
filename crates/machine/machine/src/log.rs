//! `VBox.log`: what the VM process tells, with VirtualBox's rotation (`VBox.log`, `VBox.log.1`, …).

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Old logs that are kept, VirtualBox's default for `LogHistoryCount`.
pub const HISTORY: u32 = 3;
/// A log does not grow beyond this; a guest must not fill the disk.
const SIZE_LIMIT: u64 = 64 << 20;

struct Out {
    file: BufWriter<File>,
    written: u64,
}

/// A tracing layer that writes lines `hh:mm:ss.uuuuuu target: message field=value`.
pub struct LogFile {
    origin: Instant,
    out: Mutex<Out>,
}

/// Moves `VBox.log` to `VBox.log.1` and so on, dropping what exceeds `history`.
pub fn rotate(folder: &Path, history: u32) -> io::Result<()> {
    let name = |n: u32| folder.join(if n == 0 { "VBox.log".into() } else { format!("VBox.log.{n}") });
    for n in (0..history).rev() {
        match std::fs::rename(name(n), name(n + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl LogFile {
    /// Rotates the logs in `folder` (created if missing) and opens a new `VBox.log`.
    pub fn create(folder: &Path, history: u32) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        rotate(folder, history)?;
        let file = BufWriter::new(File::create(folder.join("VBox.log"))?);
        Ok(Self { origin: Instant::now(), out: Mutex::new(Out { file, written: 0 }) })
    }

    fn line(&self, text: &str) {
        let t = self.origin.elapsed();
        let s = t.as_secs();
        let mut out = self.out.lock();
        if out.written > SIZE_LIMIT {
            return;
        }
        let line =
            format!("{:02}:{:02}:{:02}.{:06} {text}\n", s / 3600, s / 60 % 60, s % 60, t.subsec_micros());
        out.written += line.len() as u64;
        // Written through at once: the log is most wanted when the process dies.
        if out.file.write_all(line.as_bytes()).and_then(|()| out.file.flush()).is_err() {
            out.written = u64::MAX;
        } else if out.written > SIZE_LIMIT {
            let _ = writeln!(out.file, "The log has reached {SIZE_LIMIT} bytes and ends here.");
            let _ = out.file.flush();
        }
    }
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let rest = std::mem::take(&mut self.0);
            let _ = write!(self.0, "{value:?}{rest}");
        } else {
            let _ = write!(self.0, " {}={value:?}", field.name());
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogFile {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let meta = event.metadata();
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        let mark = match *meta.level() {
            Level::ERROR => "ERROR ",
            Level::WARN => "WARNING ",
            _ => "",
        };
        self.line(&format!("{}: {mark}{}", meta.target().to_uppercase(), fields.0));
    }
}

/// Makes `log` the process's log. `BOXWOOD_LOG` widens it (`debug`, `iem=trace`, …); `info` otherwise.
pub fn install(log: LogFile) {
    let wanted = std::env::var("BOXWOOD_LOG").unwrap_or_default();
    let filter: tracing_subscriber::filter::Targets = format!("info,{wanted}")
        .trim_end_matches(',')
        .parse()
        .unwrap_or_else(|_| tracing_subscriber::filter::Targets::new().with_default(Level::INFO));
    let subscriber = tracing_subscriber::registry().with(log.with_filter(filter));
    let _ = tracing::subscriber::set_global_default(subscriber);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_logs_move_up_and_the_oldest_goes() {
        let dir = std::env::temp_dir().join(format!("boxwood-log-{}", std::process::id()));
        for n in 1..=4 {
            let log = LogFile::create(&dir, 2).unwrap();
            log.line(&format!("run {n}"));
        }
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        assert!(read("VBox.log").ends_with("run 4\n"));
        assert!(read("VBox.log.1").ends_with("run 3\n"));
        assert!(read("VBox.log.2").ends_with("run 2\n"));
        assert!(!dir.join("VBox.log.3").exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
