//! Newtypes for quantities that must not be mixed up. Raw integers belong to the bus edge and to on-disk
//! structures only.

use std::fmt;

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident($raw:ty), $fmt:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $raw);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $fmt, self.0)
            }
        }
    };
}

quantity!(
    /// A guest physical address, after paging and before the A20 mask.
    GuestPhys(u64), "0x{:x}");
quantity!(
    /// A guest linear ("virtual") address, after segmentation and before paging.
    GuestVirt(u64), "0x{:x}");
quantity!(
    /// An I/O port number.
    Port(u16), "0x{:x}");
quantity!(
    /// A sector number, counted from zero; the sector's size is the medium's.
    Sector(u64), "{}");
quantity!(
    /// A number of sectors.
    SectorCount(u64), "{}");
quantity!(
    /// A size in bytes.
    ByteSize(u64), "{} bytes");
quantity!(
    /// A frequency in hertz.
    Hz(u64), "{} Hz");
quantity!(
    /// A virtual CPU's index, which is also its initial APIC id.
    VcpuId(u32), "{}");

impl GuestPhys {
    /// The address `offset` bytes further on, wrapping at 2^64.
    pub const fn wrapping_add(self, offset: u64) -> Self {
        Self(self.0.wrapping_add(offset))
    }

    /// The address `offset` bytes further on, or `None` past 2^64.
    pub fn checked_add(self, offset: u64) -> Option<Self> {
        self.0.checked_add(offset).map(Self)
    }
}

impl ByteSize {
    pub const KIB: u64 = 1 << 10;
    pub const MIB: u64 = 1 << 20;
    pub const GIB: u64 = 1 << 30;

    /// `count` mebibytes, the unit in which VirtualBox stores memory sizes.
    pub const fn mib(count: u64) -> Self {
        Self(count * Self::MIB)
    }
}

impl VcpuId {
    /// The bootstrap processor.
    pub const BSP: Self = Self(0);

    /// The id as an index into per-CPU tables.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
