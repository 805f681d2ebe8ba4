//! Storage controllers: the IDE function of PIIX3, PIIX4 and ICH6, the AHCI controller of ICH8M, NVMe, SCSI controllers, virtio-blk, and
//! the I82078 floppy controller.
//!
//! Each controller speaks its guest's protocol and hands sectors to `pdm::connector::BlockDriver`. Requests are submitted with
//! the controller's lock held and complete on other threads; until then the guest sees a busy drive.

pub mod ahci;
pub mod floppy;
pub mod ide;
pub mod nvme;
mod pieces;
pub mod scsi;
#[cfg(test)]
mod testing;
pub mod virtio_blk;
