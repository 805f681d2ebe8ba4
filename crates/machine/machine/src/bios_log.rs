//! SeaBIOS's debug port 0x402: what the BIOS tells about its work goes to the log, line by line, when `BOXWOOD_LOG` asks for
//! target `bios`. Otherwise the port is not there, and the BIOS keeps silent.

use std::sync::Arc;

use parking_lot::Mutex;
use pdm::{Iom, PortIo, Width};
use vbox_types::Port;

const PORT: Port = Port(0x402);
/// Reading the port gives this where somebody listens.
const PRESENT: u32 = 0xe9;
const LINE_LIMIT: usize = 512;

#[derive(Default)]
struct BiosLog {
    line: Vec<u8>,
}

/// Claims the port if the log wants what comes over it.
pub(crate) fn register(iom: &Iom) {
    if tracing::enabled!(target: "bios", tracing::Level::DEBUG) {
        iom.register(PORT, 1, Width::Byte, Arc::new(Mutex::new(BiosLog::default())));
    }
}

impl PortIo for BiosLog {
    fn port_read(&mut self, _port: Port, _width: Width) -> u32 {
        PRESENT
    }

    fn port_write(&mut self, _port: Port, _width: Width, value: u32) {
        let byte = value as u8;
        if byte != b'\n' {
            self.line.push(byte);
        }
        if byte == b'\n' || self.line.len() >= LINE_LIMIT {
            tracing::debug!(target: "bios", "{}", String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
    }
}
