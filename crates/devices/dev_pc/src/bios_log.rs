//! The debug port of SeaBIOS, SeaVGABIOS and OVMF (QEMU's `isa-debugcon`): what the firmware tells goes into VBox.log.
//!
//! Port 0x402: a read gives 0xe9, by which the firmware finds the port; a write is one character of text. Any guest can write there, so
//! lines are cut at 200 characters and after 1,000 lines since the last reset the rest is dropped. VirtualBox's own BIOS logs in the
//! same way through other ports.

use std::sync::Arc;

use parking_lot::Mutex;
use pdm::{Device, Iom, PortIo, Width};
use ssm::{Error, Reader, Saveable, Writer};
use vbox_types::Port;

const PORT: Port = Port(0x402);
/// What a read gives.
const SIGNATURE: u32 = 0xe9;
const LINE_LIMIT: usize = 200;
const LINES_LIMIT: u32 = 1000;

/// Takes one line of the firmware's text, without its end.
pub type Sink = Box<dyn FnMut(&str) + Send>;

/// The device.
pub struct BiosLog {
    sink: Sink,
    line: String,
    lines: u32,
}

impl BiosLog {
    /// A port that logs under the target `bios`.
    pub fn new() -> Arc<Mutex<Self>> {
        Self::with_sink(Box::new(|line| tracing::info!(target: "bios", "{line}")))
    }

    /// A port that gives its lines to `sink`.
    pub fn with_sink(sink: Sink) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { sink, line: String::new(), lines: 0 }))
    }

    /// Claims the port.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        iom.register(PORT, 1, Width::Byte, this.clone());
    }

    fn end_line(&mut self) {
        if self.lines < LINES_LIMIT {
            (self.sink)(&self.line);
        } else if self.lines == LINES_LIMIT {
            (self.sink)("(the rest until the next reset is dropped)");
        }
        self.lines = self.lines.saturating_add(1);
        self.line.clear();
    }
}

impl PortIo for BiosLog {
    fn port_read(&mut self, _port: Port, _width: Width) -> u32 {
        SIGNATURE
    }

    fn port_write(&mut self, _port: Port, _width: Width, value: u32) {
        match value as u8 {
            b'\n' => self.end_line(),
            b'\r' => {}
            byte => {
                let shown = if (b' '..=b'~').contains(&byte) { byte as char } else { '.' };
                self.line.push(shown);
                if self.line.len() >= LINE_LIMIT {
                    self.end_line();
                }
            }
        }
    }
}

/// The guest sees no state, so none is saved.
impl Saveable for BiosLog {
    fn unit_name(&self) -> &'static str {
        "bios_log"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, _out: &mut Writer) {
        let Self { sink: _, line: _, lines: _ } = self;
    }

    fn load(&mut self, input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        input.finish()
    }
}

impl Device for BiosLog {
    fn reset(&mut self) {
        self.line.clear();
        self.lines = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(text: &[u8]) -> Vec<String> {
        let log = Arc::new(Mutex::new(Vec::new()));
        let sink = log.clone();
        let device = BiosLog::with_sink(Box::new(move |line| sink.lock().push(line.to_owned())));
        let iom = Iom::new();
        BiosLog::register(&device, &iom);
        assert_eq!(iom.read(PORT, Width::Byte), SIGNATURE);
        iom.write_string(PORT, Width::Byte, text);
        std::mem::take(&mut *log.lock())
    }

    #[test]
    fn text_is_logged_by_lines_with_odd_characters_shown_as_dots() {
        assert_eq!(logged(b"one\r\n\x1btwo\nthree"), ["one", ".two"]);
    }

    #[test]
    fn a_flood_is_cut() {
        let lines = logged(&vec![b'\n'; 5000]);
        assert_eq!(lines.len(), 1001);
        assert!(lines[1000].contains("dropped"));
        assert_eq!(logged(&[b'x'; 450]), ["x".repeat(200), "x".repeat(200)]);
    }
}
