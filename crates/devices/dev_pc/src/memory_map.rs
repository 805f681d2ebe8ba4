//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  RAM; 0xa0000–0xbffff VGA, 0xc0000–0xfffff RAM or ROM by the host bridge's PAM registers
//! 0xe000_0000  end of low RAM at most; PCI BARs from the end of low RAM on
//! 0xfec0_0000  I/O APIC
//! 0xfed0_0000  HPET
//! 0xfee0_0000  local APICs
//! 0xfffc_0000  BIOS (its last byte at 0xffff_ffff)
//! 0x1_0000_0000  the rest of RAM
//! ```

use vbox_types::{ByteSize, GuestPhys};

/// Low RAM ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 0xe000_0000;
/// Where RAM that does not fit below [`LOW_RAM_LIMIT`] goes on.
pub const HIGH_RAM: GuestPhys = GuestPhys(0x1_0000_0000);
/// First address past the window for PCI BARs below 4 GiB.
pub const PCI_WINDOW_END: u64 = IO_APIC.0;
pub const IO_APIC: GuestPhys = GuestPhys(0xfec0_0000);
pub const HPET: GuestPhys = GuestPhys(0xfed0_0000);
pub const LOCAL_APIC: GuestPhys = GuestPhys(0xfee0_0000);
/// The legacy area: video memory, option ROMs and BIOS.
pub const VGA: GuestPhys = GuestPhys(0xa_0000);
pub const OPTION_ROMS: GuestPhys = GuestPhys(0xc_0000);
pub const ONE_MIB: u64 = 0x10_0000;

/// I/O ports of the power management block as SeaBIOS places it, and as the ACPI tables tell.
pub const PM_BASE: u16 = 0x600;
/// I/O ports of the SMBus controller as SeaBIOS places it.
pub const SMBUS_BASE: u16 = 0x700;

/// Splits RAM into what lies below [`LOW_RAM_LIMIT`] and what lies from [`HIGH_RAM`] on.
pub fn split_ram(ram: ByteSize) -> (u64, u64) {
    let low = ram.0.min(LOW_RAM_LIMIT);
    (low, ram.0 - low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_the_limit_goes_on_at_four_gib() {
        assert_eq!(split_ram(ByteSize::mib(512)), (512 << 20, 0));
        assert_eq!(split_ram(ByteSize::mib(4096)), (LOW_RAM_LIMIT, 0x2000_0000));
    }
}
