//! Connectors: the contracts between devices and what lies behind them.
//!
//! A device hands work to a connector with its own lock held; the connector only queues it. Completions and input
//! arrive on other threads and take the device's lock then.

use std::sync::Arc;

use vbox_types::ByteSize;

/// Why a block request failed.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("range at byte {offset} of {len} bytes lies outside the medium of {size} bytes")]
    OutOfRange { offset: u64, len: u64, size: u64 },
    #[error("the medium is read-only")]
    ReadOnly,
    #[error("no medium")]
    NoMedium,
    #[error("host input/output error")]
    Io(#[source] std::io::Error),
}

/// What to do. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum BlockOp {
    /// Fill `buffer` from `offset` on.
    Read { offset: u64, buffer: Vec<u8> },
    /// Write `buffer` at `offset`.
    Write { offset: u64, buffer: Vec<u8> },
    /// Make every write completed so far durable.
    Flush,
    /// The range's content is not needed any more.
    Discard { offset: u64, len: u64 },
}

/// Called once, on a thread of the back end, never from inside [`BlockDriver::submit`]. Gets the buffer back.
pub type BlockDone = Box<dyn FnOnce(Result<Vec<u8>, BlockError>) + Send>;

/// A medium as a controller sees it. Controllers may pass any range: the driver checks it.
pub trait BlockDriver: Send + Sync {
    /// Size of the medium.
    fn size(&self) -> ByteSize;
    fn is_read_only(&self) -> bool;
    /// Queues a request. Requests may complete in any order; a flush covers what completed before it was submitted.
    fn submit(&self, op: BlockOp, done: BlockDone);
}

/// A removable drive's slot: what is in it now.
pub type Medium = Option<Arc<dyn BlockDriver>>;

/// The network that a card is plugged into: takes the frames that the guest sends. Frames are Ethernet ones from the destination
/// address on, without the checksum at their end.
pub trait NetDriver: Send + Sync {
    /// Queues a frame; gives it back if there is no room now. Then the driver calls [`NetPort::ready`] once there is.
    fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>>;
    /// The port refused a frame and has room again: the driver offers it once more.
    fn resume(&self);
    /// Whether [`NetDriver::send`] takes TCP packets whole that would be several frames on a wire: up to 64 KiB of IPv4, with lengths and
    /// checksums as if they were one frame.
    fn takes_packets(&self) -> bool {
        false
    }
}

/// A network card as the network sees it. Implemented by the device, called from back-end threads, never from inside a
/// [`NetDriver`]'s methods.
pub trait NetPort: Send + Sync {
    /// A frame for the guest, as above. False if the guest has no room for it now: the driver keeps it until
    /// [`NetDriver::resume`]. A frame that the card does not want counts as taken.
    fn receive(&self, frame: &[u8]) -> bool;
    /// Whether the guest takes TCP packets whole now: see [`NetPort::receive_packet`].
    fn takes_packets(&self) -> bool {
        false
    }
    /// As above for a TCP packet that would be several frames on a wire, up to 64 KiB of IPv4, with lengths and checksums as if it were
    /// one. `mss`: bytes of data that each of the frames would have.
    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        let _ = mss;
        self.receive(packet)
    }
    /// The driver has room again.
    fn ready(&self);
    /// The cable was plugged in or pulled out.
    fn set_link(&self, up: bool);
}

/// The back end of a serial port: takes what the guest sends.
pub trait CharDriver: Send + Sync {
    /// Queues bytes the guest sent; returns how many were taken. If not all, the driver calls the port's
    /// [`CharPort::ready`] when there is room again.
    fn write(&self, data: &[u8]) -> usize;
    /// The guest's modem control outputs changed.
    fn set_modem_control(&self, dtr: bool, rts: bool);
    /// The guest turned its break condition on or off.
    fn set_break(&self, on: bool);
}

/// A serial port as its back end sees it. Implemented by the device, called from back-end threads.
pub trait CharPort: Send + Sync {
    /// Bytes for the guest; returns how many were taken (the FIFO has limits). The back end keeps the rest and tries again after
    /// [`CharPort::wait_writable`]'s callback.
    fn receive(&self, data: &[u8]) -> usize;
    /// Calls `wake` once when the port can take bytes again. `wake` runs with the device's lock held: it may only signal a thread.
    fn wait_writable(&self, wake: Box<dyn FnOnce() + Send>);
    /// The driver can take bytes again.
    fn ready(&self);
    /// Modem status inputs.
    fn set_modem_status(&self, dcd: bool, dsr: bool, cts: bool, ri: bool);
}

/// A keyboard as clients see it.
pub trait KeyboardPort: Send + Sync {
    /// Queues set-1 scan codes, as `IKeyboard::putScancodes` takes them; returns how many fitted.
    fn put_scancodes(&self, codes: &[u8]) -> usize;
    /// Lock-key lights: num, caps, scroll.
    fn leds(&self) -> (bool, bool, bool);
}

/// A pointing device as clients see it.
pub trait MousePort: Send + Sync {
    /// Relative motion in mickeys (`dy` grows downwards), wheel steps, and buttons: bit 0 left, 1 right, 2 middle.
    fn put_event(&self, dx: i32, dy: i32, dz: i32, buttons: u8);
}

/// A picture of the screen: 32 bits per pixel, byte order blue, green, red, unused; rows from the top without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

/// A display adapter as clients see it.
pub trait DisplayPort: Send + Sync {
    /// Draws what the screen shows now. A blanked screen is black in the size of its mode.
    fn frame(&self) -> Frame;
    /// The characters on the screen if it is in a text mode: rows of code-page-437 bytes.
    fn text(&self) -> Option<Vec<Vec<u8>>>;
}

/// What the guest asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemRequest {
    /// Reset of the whole machine (port 0xcf9, keyboard controller, ACPI reset register).
    Reset,
    /// Soft-off (ACPI S5, APM).
    PowerOff,
    /// Suspend to RAM (ACPI S3).
    Suspend,
}

/// Takes such requests; queues them for EM, never acts at once.
pub trait SystemControl: Send + Sync {
    fn request(&self, request: SystemRequest);
}
