//! Ethernet frames: their checksums, and what senders leave to cards: summing, and cutting TCP packets into frames.

pub mod checksum;
pub mod offload;
