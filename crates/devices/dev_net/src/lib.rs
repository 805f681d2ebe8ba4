//! Network cards: Intel's PRO/1000 (82540EM, 82543GC, 82545EM) and the paravirtual one of virtio.
//!
//! A card speaks its guest's protocol and hands frames to `pdm::connector::NetDriver`; frames for the guest come in through
//! `pdm::connector::NetPort` on other threads.

mod checksum;
pub mod e1000;
pub mod virtio;
