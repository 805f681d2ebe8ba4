//! PGM, the page manager: guest RAM, ROM and device memory, and where each lies in guest physical space.
//!
//! * [`HostMemory`] is a piece of host memory that a guest sees (RAM, a ROM image, video memory): a memfd mapped
//!   once for the VM's life, with a dirty bitmap and a map of pages that engines have decoded code from.
//! * [`Pgm`] lays pieces out over the guest physical address space in layers, with different targets for reads
//!   and writes, and moves them when the guest reprograms a BAR, a PAM register or A20.
//! * Engines resolve a page once ([`Pgm::resolve`]), cache host pointers, and drop them on a shoot-down.
//! * Everybody else (devices doing DMA, firmware loading) uses [`Pgm::read`] and [`Pgm::write`].

mod memory;
mod space;

pub use memory::{CodePage, CodeWrites, HostMemory, PAGE_SIZE};
pub use space::{Backing, Backlog, Layer, Layout, MapHandle, MmioHandler, PageView, Pgm, PhysError, Target};
