//! ISA DMA as a device sees it: the 8237 pair's channels.

/// How a DMA transfer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaOutcome {
    /// Bytes moved; fewer than offered if the channel is masked or reached its count.
    pub bytes: usize,
    /// The channel reached terminal count.
    pub terminal_count: bool,
}

/// The DMA controllers. A device on the ISA bus asserts its request by calling one of these; `channel` is 0–7.
pub trait IsaDma: Send + Sync {
    /// Device to memory: `data` goes to where the channel points.
    fn write_memory(&self, channel: u8, data: &[u8]) -> DmaOutcome;
    /// Memory to device: fills `data` from where the channel points.
    fn read_memory(&self, channel: u8, data: &mut [u8]) -> DmaOutcome;
}
