//! Network cards: Intel's PRO/1000 (82540EM, 82543GC, 82545EM), AMD's PCnet (Am79C970A, Am79C973, Am79C960) and the
//! paravirtual one of virtio.
//!
//! A card speaks its guest's protocol and hands frames to `pdm::connector::NetDriver`; frames for the guest come in through
//! `pdm::connector::NetPort` on other threads.

pub mod e1000;
pub mod pcnet;
#[cfg(test)]
mod testing;
pub mod virtio;
