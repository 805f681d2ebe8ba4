//! Guest memory as instructions see it: through segmentation and paging, at the current privilege.

use cpum::CpuState;

use crate::Fault;

/// Memory accesses of an instruction that makes several (gathers, masked moves, XSAVE areas). Every access is an explicit data
/// access at the current privilege level; what it faults with is what the instruction raises. An instruction that must not have
/// effects when it faults probes all it writes first.
pub trait GuestMemory {
    /// The linear address of `offset` in segment number `seg` (`cpum::state::seg`), after the checks for an access of `size` bytes.
    fn linear(
        &mut self,
        cpu: &CpuState,
        seg: usize,
        offset: u64,
        size: u32,
        write: bool,
    ) -> Result<u64, Fault>;

    /// Reads `out.len()` bytes at a linear address.
    fn read_bytes(&mut self, cpu: &CpuState, linear: u64, out: &mut [u8]) -> Result<(), Fault>;

    /// Writes `data` at a linear address; nothing is written if any byte faults.
    fn write_bytes(&mut self, cpu: &CpuState, linear: u64, data: &[u8]) -> Result<(), Fault>;

    /// Faults as a write of `size` bytes would, without writing.
    fn probe_write(&mut self, cpu: &CpuState, linear: u64, size: u32) -> Result<(), Fault>;
}
