//! Data structures that the controller tells about itself (section 5.11) and its log pages (section 5.10.1).

use std::collections::VecDeque;

use super::controller::{Counters, ErrorEntry, Shape};
use super::spec::{ERROR_ENTRIES, EVENT_REQUESTS, MDTS, VERSION};

/// What VirtualBox's controller calls itself.
const SERIAL: &str = "VB1234-56789";
const MODEL: &str = "ORCL-VBOX-NVME-VER12";
const FIRMWARE: &str = "1.0";
/// Kelvin.
const TEMPERATURE: u16 = 303;

pub(super) fn empty() -> Vec<u8> {
    vec![0; 4096]
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put_text(data: &mut [u8], at: usize, len: usize, text: &str) {
    data[at..at + len].fill(b' ');
    put(data, at, text.as_bytes());
}

pub(super) fn controller(namespaces: u32) -> Vec<u8> {
    let mut data = empty();
    let vendor = super::VENDOR.to_le_bytes();
    put(&mut data, 0, &vendor);
    put(&mut data, 2, &vendor);
    put_text(&mut data, 4, 20, SERIAL);
    put_text(&mut data, 24, 40, MODEL);
    put_text(&mut data, 64, 8, FIRMWARE);
    data[77] = MDTS;
    put(&mut data, 80, &VERSION.to_le_bytes());
    // Doorbell buffers.
    put(&mut data, 256, &0x0100u16.to_le_bytes());
    // Aborts and event requests at once, less one; one firmware slot, read-only; entries of the error log, less one.
    data[258] = 3;
    data[259] = EVENT_REQUESTS as u8 - 1;
    data[260] = 0x03;
    data[262] = ERROR_ENTRIES as u8 - 1;
    // Warning and critical temperature.
    put(&mut data, 266, &343u16.to_le_bytes());
    put(&mut data, 268, &373u16.to_le_bytes());
    // Sizes of queue entries as powers of two: the smallest and the greatest.
    data[512] = 0x66;
    data[513] = 0x44;
    put(&mut data, 516, &namespaces.to_le_bytes());
    // Dataset management, write zeroes.
    put(&mut data, 520, &0x000cu16.to_le_bytes());
    // A volatile write cache is present.
    data[525] = 1;
    // The power state: 25 W.
    put(&mut data, 2048, &2500u16.to_le_bytes());
    data
}

pub(super) fn namespace(shape: &Shape) -> Vec<u8> {
    let mut data = empty();
    // Size, capacity, use.
    for at in [0, 8, 16] {
        put(&mut data, at, &shape.blocks.to_le_bytes());
    }
    // Thin provisioning.
    data[24] = u8::from(shape.discard);
    put(&mut data, 104, &shape.uuid);
    // The one format: blocks of 2^9 bytes.
    data[130] = 9;
    data
}

/// Namespace ids, ascending.
pub(super) fn list(ids: impl Iterator<Item = u32>) -> Vec<u8> {
    let mut data = empty();
    for (slot, id) in data.as_chunks_mut::<4>().0.iter_mut().zip(ids) {
        *slot = id.to_le_bytes();
    }
    data
}

pub(super) fn error_log(errors: &VecDeque<ErrorEntry>) -> Vec<u8> {
    let mut data = vec![0; 64 * ERROR_ENTRIES];
    for (entry, error) in data.as_chunks_mut::<64>().0.iter_mut().zip(errors) {
        let ErrorEntry { count, sq, cid, status, lba, nsid } = error;
        put(entry, 0, &count.to_le_bytes());
        put(entry, 8, &sq.to_le_bytes());
        put(entry, 10, &cid.to_le_bytes());
        put(entry, 12, &(status << 1).to_le_bytes());
        put(entry, 14, &0xffffu16.to_le_bytes());
        put(entry, 16, &lba.to_le_bytes());
        put(entry, 24, &nsid.to_le_bytes());
    }
    data
}

pub(super) fn health_log(counters: &Counters, errors: u64) -> Vec<u8> {
    let Counters { blocks_read, blocks_written, reads, writes, media_errors } = counters;
    let mut data = vec![0; 512];
    put(&mut data, 1, &TEMPERATURE.to_le_bytes());
    // Spare capacity and its threshold in percent.
    data[3] = 100;
    data[4] = 10;
    // In thousands of blocks, rounded up.
    put(&mut data, 32, &blocks_read.div_ceil(1000).to_le_bytes());
    put(&mut data, 48, &blocks_written.div_ceil(1000).to_le_bytes());
    put(&mut data, 64, &reads.to_le_bytes());
    put(&mut data, 80, &writes.to_le_bytes());
    put(&mut data, 160, &media_errors.to_le_bytes());
    put(&mut data, 176, &errors.to_le_bytes());
    data
}

pub(super) fn firmware_log() -> Vec<u8> {
    let mut data = vec![0; 512];
    // Slot 1 is active.
    data[0] = 1;
    put_text(&mut data, 8, 8, FIRMWARE);
    data
}
