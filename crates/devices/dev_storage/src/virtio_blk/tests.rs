use std::sync::Arc;
use std::sync::atomic::Ordering;

use dev_virtio_core::{VirtioDevice, Wiring, feature};
use parking_lot::Mutex;
use pdm::{Device, MmioDevice, PortIo, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use ssm::{Reader, Saveable, Writer};
use vbox_types::{ByteSize, GuestPhys, Port};

use super::{Card, Disk, IOERR, OK, UNSUPP, VirtioBlk, bit, kind};
use crate::testing::{Line, MemoryMedium, assert_golden};

const SECTORS: usize = 8192;
const DATA: u64 = 0x10_0000;
/// Where a request's header and status lie.
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;

/// A driver of virtio 1.0 with one queue at 0x1000.
struct Driver {
    pgm: Arc<Pgm>,
    card: Arc<Mutex<Card>>,
    medium: Arc<MemoryMedium>,
    line: Arc<Line>,
    given: u16,
}

fn wire(medium: Arc<MemoryMedium>) -> (Arc<Pgm>, Arc<Mutex<Card>>, Arc<Line>) {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize::mib(8)).unwrap());
    pgm.map(GuestPhys(0), 8 << 20, Layer::Ram, Backing::ram(ram, 0));
    let (line, irq) = Line::connect();
    let disk = Disk { medium, serial: "VB0123abcd-4567ef89".into(), discard: true };
    let card = VirtioBlk::create(disk, Wiring { pgm: pgm.clone(), irq });
    (pgm, card, line)
}

impl Driver {
    fn new(features: u64) -> Self {
        Self::with(features, MemoryMedium::numbered(SECTORS, 512))
    }

    fn with(features: u64, medium: Arc<MemoryMedium>) -> Self {
        let (pgm, card, line) = wire(medium.clone());
        let mut driver = Self { pgm, card, medium, line, given: 0 };
        driver.start(features);
        driver
    }

    fn start(&mut self, features: u64) {
        self.given = 0;
        self.pgm.write(GuestPhys(0x1000), &[0; 0x3000]);
        let features = features | feature::VERSION_1;
        self.write(20, &[3]);
        for half in 0..2u32 {
            self.write(8, &half.to_le_bytes());
            self.write(12, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.write(20, &[11]);
        for (at, value) in [(32, 0x1000u64), (40, 0x2000), (48, 0x3000)] {
            self.write(at, &value.to_le_bytes());
        }
        self.write(28, &[1, 0]);
        self.write(20, &[15]);
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.card.lock().mmio_write(0, at, data);
    }

    fn config(&self, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.card.lock().mmio_read(0, 0x2000 + at, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut data);
        data
    }

    /// Gives a request with data in the pieces, which the device reads or writes.
    fn submit(&mut self, what: u32, sector: u64, pieces: &[(u64, u32)], device_writes: bool) {
        let mut header = what.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        self.pgm.write(GuestPhys(HEADER), &header);
        self.pgm.write(GuestPhys(STATUS), &[0xff]);
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(pieces.iter().map(|&(at, len)| (at, len, device_writes)));
        chain.push((STATUS, 1, true));
        let last = chain.len() - 1;
        for (i, (at, len, writes)) in chain.into_iter().enumerate() {
            let flags = u16::from(i < last) | u16::from(writes) << 1;
            let mut raw = at.to_le_bytes().to_vec();
            raw.extend_from_slice(&u32::to_le_bytes(len));
            raw.extend_from_slice(&flags.to_le_bytes());
            raw.extend_from_slice(&(i as u16 + 1).to_le_bytes());
            self.pgm.write(GuestPhys(0x1000 + 16 * i as u64), &raw);
        }
        self.pgm.write(GuestPhys(0x2004 + 2 * u64::from(self.given % 256)), &[0, 0]);
        self.given += 1;
        self.pgm.write(GuestPhys(0x2002), &self.given.to_le_bytes());
        self.write(0x3000, &[0, 0]);
    }

    /// Status and written bytes of the last request, if it has come back.
    fn answer(&self) -> Option<(u8, u32)> {
        if self.bytes(0x3002, 2) != self.given.to_le_bytes() {
            return None;
        }
        let used = self.bytes(0x3004 + 8 * u64::from((self.given - 1) % 256) + 4, 4);
        let len = u32::from_le_bytes(used.try_into().unwrap());
        Some((self.bytes(STATUS, 1)[0], len))
    }

    fn run(&mut self, what: u32, sector: u64, pieces: &[(u64, u32)], device_writes: bool) -> (u8, u32) {
        self.submit(what, sector, pieces, device_writes);
        self.medium.complete_all();
        self.answer().expect("an answer")
    }

    fn segment(&self, index: u64, sector: u64, count: u32, flags: u32) {
        let mut raw = sector.to_le_bytes().to_vec();
        raw.extend_from_slice(&count.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        self.pgm.write(GuestPhys(DATA + 16 * index), &raw);
    }
}

#[test]
fn sectors_go_to_and_from_memory_in_pieces() {
    let mut driver = Driver::new(bit::FLUSH);
    let data: Vec<u8> = (0..1536u32).map(|i| (i % 251) as u8).collect();
    driver.pgm.write(GuestPhys(DATA), &data[..700]);
    driver.pgm.write(GuestPhys(DATA + 0x1000), &data[700..]);
    let pieces = [(DATA, 700), (DATA + 0x1000, 836)];
    assert_eq!(driver.run(kind::OUT, 5, &pieces, false), (OK, 1));
    assert_eq!(driver.medium.bytes.lock()[5 * 512..8 * 512], data);
    assert_eq!(driver.run(kind::IN, 6, &[(DATA + 0x2001, 1), (DATA + 0x3000, 511)], true), (OK, 513));
    assert_eq!(driver.bytes(DATA + 0x2001, 1), data[512..513]);
    assert_eq!(driver.bytes(DATA + 0x3000, 511), data[513..1024]);
    assert!(driver.line.level());
}

#[test]
fn a_long_request_goes_to_the_medium_in_pieces_and_comes_back_once() {
    let mut driver = Driver::new(bit::FLUSH);
    let len = 3 << 20;
    driver.submit(kind::IN, 1, &[(DATA, len)], true);
    let mut requests = 0;
    while driver.medium.complete_one() {
        requests += 1;
    }
    assert_eq!((requests, driver.answer()), (3, Some((OK, len + 1))));
    assert_eq!(driver.bytes(DATA + (2 << 20), 512), [(4097u32) as u8; 512]);
}

#[test]
fn requests_outside_the_disk_and_unknown_ones_are_refused() {
    let mut driver = Driver::new(bit::FLUSH);
    let data = [(DATA, 1024)];
    assert_eq!(driver.run(kind::IN, SECTORS as u64 - 1, &data, true), (IOERR, 1));
    assert_eq!(driver.run(kind::OUT, u64::MAX, &data, false), (IOERR, 1));
    assert_eq!(driver.run(kind::IN, 0, &[(DATA, 100)], true), (IOERR, 1));
    assert_eq!(driver.run(99, 0, &data, true), (UNSUPP, 1));
    driver.segment(0, 0, 1, 1);
    assert_eq!(driver.run(kind::DISCARD, 0, &[(DATA, 16)], false), (UNSUPP, 1));
    driver.segment(0, SECTORS as u64, 1, 0);
    assert_eq!(driver.run(kind::DISCARD, 0, &[(DATA, 16)], false), (IOERR, 1));
    assert_eq!(driver.run(kind::WRITE_ZEROES, 0, &[(DATA, 15)], false), (IOERR, 1));
    driver.medium.broken.store(true, Ordering::Relaxed);
    assert_eq!(driver.run(kind::IN, 0, &data, true), (IOERR, 1));
}

#[test]
fn a_request_without_room_for_its_status_comes_back_and_does_nothing() {
    let driver = Driver::new(bit::FLUSH);
    // One descriptor, read by the device, and no more.
    let mut raw = HEADER.to_le_bytes().to_vec();
    raw.extend_from_slice(&[16, 0, 0, 0, 0, 0, 0, 0]);
    driver.pgm.write(GuestPhys(0x1000), &raw);
    driver.pgm.write(GuestPhys(0x2002), &[1, 0]);
    driver.write(0x3000, &[0, 0]);
    assert_eq!((driver.bytes(0x3002, 2), driver.medium.waiting()), (vec![1, 0], 0));
}

#[test]
fn writes_are_durable_at_once_unless_the_driver_flushes() {
    let flushes = |driver: &Driver| driver.medium.flushes.load(Ordering::Relaxed);
    let mut driver = Driver::new(bit::FLUSH | bit::CONFIG_WCE);
    assert_eq!(driver.run(kind::OUT, 0, &[(DATA, 512)], false), (OK, 1));
    assert_eq!(flushes(&driver), 0);
    assert_eq!(driver.run(kind::FLUSH, 0, &[], false), (OK, 1));
    assert_eq!(flushes(&driver), 1);
    assert_eq!(driver.config(32, 1), 1);
    driver.write(0x2020, &[0]);
    assert_eq!((driver.config(32, 1), driver.run(kind::OUT, 0, &[(DATA, 512)], false)), (0, (OK, 1)));
    assert_eq!(flushes(&driver), 2);
    let mut plain = Driver::new(0);
    assert_eq!(plain.run(kind::OUT, 0, &[(DATA, 512)], false), (OK, 1));
    assert_eq!(flushes(&plain), 1);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut driver = Driver::new(bit::FLUSH | bit::DISCARD | bit::WRITE_ZEROES);
    driver.segment(0, 10, 2, 0);
    driver.segment(1, 20, 0, 0);
    driver.segment(2, 30, 4000, 0);
    let medium = driver.medium.clone();
    let sector = |n: usize| medium.bytes.lock()[n * 512];
    assert_eq!(driver.run(kind::DISCARD, 0, &[(DATA, 32)], false), (OK, 1));
    assert_eq!([9, 10, 11, 12, 20, 30].map(sector), [9, 0, 0, 12, 20, 30]);
    assert_eq!(driver.run(kind::WRITE_ZEROES, 0, &[(DATA, 48)], false), (OK, 1));
    assert_eq!([29, 30, 2100, 4029, 4030].map(sector), [29, 0, 0, 0, 4030u32 as u8]);
    assert_eq!((driver.config(36, 4), driver.config(40, 4)), (1 << 21, 64));
}

#[test]
fn the_serial_number_and_the_size_are_told() {
    let mut driver = Driver::new(bit::FLUSH);
    assert_eq!(driver.run(kind::GET_ID, 0, &[(DATA, 20)], true), (OK, 21));
    assert_eq!(driver.bytes(DATA, 20), b"VB0123abcd-4567ef89\0");
    assert_eq!((driver.config(0, 8), driver.config(20, 4), driver.config(34, 2)), (SECTORS as u64, 512, 4));
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let mut driver = Driver::with(bit::FLUSH | bit::RO, MemoryMedium::with(vec![0; 4096], true));
    assert_ne!(driver.card.lock().device.features() & bit::RO, 0);
    assert_eq!(driver.run(kind::OUT, 0, &[(DATA, 512)], false), (IOERR, 1));
    driver.segment(0, 0, 1, 0);
    assert_eq!(driver.run(kind::WRITE_ZEROES, 0, &[(DATA, 16)], false), (IOERR, 1));
}

#[test]
fn a_reset_drops_requests_and_later_ones_wait_for_the_medium() {
    let mut driver = Driver::new(bit::FLUSH);
    driver.submit(kind::OUT, 0, &[(DATA, 512)], false);
    driver.write(20, &[0]);
    driver.start(bit::FLUSH);
    driver.submit(kind::OUT, 1, &[(DATA, 512)], false);
    assert_eq!((driver.medium.waiting(), driver.answer()), (1, None));
    assert!(driver.medium.complete_one());
    assert_eq!((driver.medium.waiting(), driver.answer()), (1, None));
    driver.medium.complete_all();
    assert_eq!(driver.answer(), Some((OK, 1)));
    assert!(driver.card.lock().device.is_idle());
}

#[test]
fn a_legacy_driver_reads_a_sector() {
    let (pgm, card, _) = wire(MemoryMedium::numbered(16, 512));
    let port = |at: u16, width: Width, value: u32| card.lock().port_write(Port(0xd000 + at), width, value);
    port(0x12, Width::Byte, 3);
    port(0x0e, Width::Word, 0);
    port(0x08, Width::Dword, 1);
    port(0x12, Width::Byte, 7);
    for (i, (at, len, flags)) in [(HEADER, 16u32, 1u16), (DATA, 512, 3), (STATUS, 1, 2)].iter().enumerate() {
        let mut raw = at.to_le_bytes().to_vec();
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&(i as u16 + 1).to_le_bytes());
        pgm.write(GuestPhys(0x1000 + 16 * i as u64), &raw);
    }
    pgm.write(GuestPhys(HEADER + 8), &[3]);
    // The available ring lies behind the 256 descriptors.
    pgm.write(GuestPhys(0x2002), &[1, 0]);
    let medium = card.lock().device.disk.medium.clone();
    port(0x10, Width::Word, 0);
    assert!(!card.lock().device.is_idle());
    drop(medium);
    assert_eq!(card.lock().port_read(Port(0xd014), Width::Dword), 16);
}

fn save(card: &Card) -> Vec<u8> {
    let mut out = Writer::new();
    card.save(&mut out);
    out.into_bytes()
}

#[test]
fn a_saved_disk_goes_on_where_it_was() {
    let mut driver = Driver::new(bit::FLUSH | bit::CONFIG_WCE);
    driver.run(kind::OUT, 0, &[(DATA, 512)], false);
    driver.write(0x2020, &[0]);
    let bytes = save(&driver.card.lock());
    assert_golden(&bytes, include_str!("../golden/virtio_blk.v1.hex"));
    let medium = MemoryMedium::numbered(SECTORS, 512);
    let (_, card, line) = wire(medium);
    card.lock().load(Reader::new("virtio-blk", 1, &bytes)).unwrap();
    assert_eq!((save(&card.lock()), line.level()), (bytes.clone(), true));
    let (_, smaller, _) = wire(MemoryMedium::numbered(8, 512));
    assert!(smaller.lock().load(Reader::new("virtio-blk", 1, &bytes)).is_err());
    Device::reset(&mut *card.lock());
    assert_ne!(save(&card.lock()), bytes);
}
