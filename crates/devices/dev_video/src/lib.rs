//! Display adapters.
//!
//! [`vga::Vga`] is VirtualBox's VGA adapter, PCI 80ee:beef: an IBM VGA with the Bochs VBE extension ("DISPI") that the video BIOS of
//! SeaBIOS drives.

pub mod vga;
