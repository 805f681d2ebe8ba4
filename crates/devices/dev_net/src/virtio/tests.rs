use std::sync::atomic::Ordering;

use pdm::{Device, MmioDevice};
use pgm::Pgm;
use ssm::Saveable;
use vbox_types::{ByteSize, GuestPhys};

use super::*;
use crate::testing::{Line, MAC, Wire, memory};

const OTHER: [u8; 6] = [0x52, 0x54, 0x00, 1, 2, 3];
/// Table, available and used ring of each queue, a page each.
const QUEUES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x4_0000;

struct Bench {
    card: Arc<Mutex<Card>>,
    port: Arc<dyn NetPort>,
    pgm: Arc<Pgm>,
    wire: Arc<Wire>,
    given: [u16; 3],
}

impl Bench {
    /// A card whose driver, of virtio 1.0, has taken `features`.
    fn new(features: u64) -> Self {
        let pgm = memory(ByteSize::mib(4));
        let (_, irq) = Line::pair();
        let card = VirtioNet::create(MAC, true, Wiring { pgm: pgm.clone(), irq });
        let wire = Wire::new();
        VirtioNet::connect(&card, Some(wire.clone()));
        let port = VirtioNet::port(&card);
        let bench = Self { card, port, pgm, wire, given: [0; 3] };
        let features = features | feature::VERSION_1;
        bench.write(20, &[3]);
        for half in 0..2u32 {
            bench.write(8, &half.to_le_bytes());
            bench.write(12, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        bench.write(20, &[11]);
        for queue in 0..3u16 {
            bench.write(22, &queue.to_le_bytes());
            let base = QUEUES + 0x8000 * u64::from(queue);
            bench.write(32, &base.to_le_bytes());
            bench.write(40, &(base + 0x4000).to_le_bytes());
            bench.write(48, &(base + 0x6000).to_le_bytes());
            bench.write(28, &[1, 0]);
        }
        bench.write(20, &[15]);
        bench
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.card.lock().mmio_write(0, at, bytes);
    }

    /// Makes a chain available and notifies: `regions` are addresses, lengths and whether the device writes.
    fn give(&mut self, queue: usize, regions: &[(u64, u32, bool)]) {
        let base = QUEUES + 0x8000 * queue as u64;
        let index = self.given[queue];
        let size = if queue == CONTROL { 64 } else { 256 };
        let head = (index * 4) % size;
        for (i, (address, len, write)) in regions.iter().enumerate() {
            let last = i + 1 == regions.len();
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&(u16::from(!last) | u16::from(*write) << 1).to_le_bytes());
            bytes.extend_from_slice(&(head + i as u16 + 1).to_le_bytes());
            self.pgm.write(GuestPhys(base + 16 * u64::from(head + i as u16)), &bytes);
        }
        self.pgm.write(GuestPhys(base + 0x4004 + 2 * u64::from(index % size)), &head.to_le_bytes());
        self.given[queue] += 1;
        self.pgm.write(GuestPhys(base + 0x4002), &self.given[queue].to_le_bytes());
        self.write(0x3000 + 4 * queue as u64, &[queue as u8, 0]);
    }

    /// Lengths of the chains that came back.
    fn used(&self, queue: usize) -> Vec<u32> {
        let base = QUEUES + 0x8000 * queue as u64 + 0x6000;
        let word = |at: u64| {
            let mut bytes = [0; 4];
            self.pgm.read(GuestPhys(at), &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let count = word(base) >> 16;
        (0..u64::from(count)).map(|i| word(base + 4 + 8 * i + 4)).collect()
    }

    fn send(&mut self, header: &[u8], frame: &[u8]) {
        let mut packet = header.to_vec();
        packet.resize(12, 0);
        packet.extend_from_slice(frame);
        let at = BUFFERS + 0x2_0000;
        self.pgm.write(GuestPhys(at), &packet);
        self.give(TX, &[(at, 12, false), (at + 12, packet.len() as u32 - 12, false)]);
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut bytes);
        bytes
    }

    fn command(&mut self, data: &[u8]) -> u8 {
        let at = BUFFERS + 0x3_0000;
        self.pgm.write(GuestPhys(at), data);
        self.pgm.write(GuestPhys(at + 0x1000), &[0xee]);
        self.give(CONTROL, &[(at, data.len() as u32, false), (at + 0x1000, 1, true)]);
        self.bytes(at + 0x1000, 1)[0]
    }
}

fn frame(dst: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = dst.to_vec();
    frame.extend_from_slice(&OTHER);
    frame.extend_from_slice(&[8, 0]);
    frame.resize(len, 0x5a);
    frame
}

#[test]
fn frames_go_out_and_their_checksums_are_filled_in() {
    let mut bench = Bench::new(bit::CSUM);
    let plain = frame(OTHER, 60);
    bench.send(&[], &plain);
    // Start at 14, field 6 bytes behind.
    bench.send(&[NEEDS_CSUM, 0, 0, 0, 0, 0, 14, 0, 6, 0], &plain);
    let frames = bench.wire.frames.lock();
    assert_eq!(frames[0], plain);
    assert_ne!(frames[1][20..22], plain[20..22]);
    assert_eq!(bench.used(TX), [0, 0]);
}

#[test]
fn a_frame_waits_for_buffers_and_may_fill_several() {
    let mut bench = Bench::new(bit::MRG_RXBUF | bit::GUEST_CSUM);
    let long = frame(MAC, 1500);
    assert!(!bench.port.receive(&long));
    assert!(bench.used(RX).is_empty());
    bench.give(RX, &[(BUFFERS, 1000, true)]);
    assert_eq!(bench.wire.resumed.load(Ordering::SeqCst), 1);
    assert!(!bench.port.receive(&long));
    bench.give(RX, &[(BUFFERS + 0x1000, 1000, true)]);
    assert!(bench.port.receive(&long));
    assert_eq!(bench.used(RX), [1000, 512]);
    let head = bench.bytes(BUFFERS, 1000);
    assert_eq!(head[..12], [DATA_VALID, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    let mut got = head[12..].to_vec();
    got.extend(bench.bytes(BUFFERS + 0x1000, 512));
    assert_eq!(got, long);
}

#[test]
fn without_merging_a_frame_that_is_too_long_is_lost() {
    let mut bench = Bench::new(0);
    bench.give(RX, &[(BUFFERS, 12, true), (BUFFERS + 12, 100, true)]);
    assert!(bench.port.receive(&frame(MAC, 200)));
    assert_eq!(bench.used(RX), [0]);
    bench.give(RX, &[(BUFFERS, 12, true), (BUFFERS + 12, 100, true)]);
    assert!(bench.port.receive(&frame(MAC, 64)));
    assert_eq!(bench.used(RX), [0, 76]);
}

#[test]
fn the_driver_chooses_what_it_hears() {
    let mut bench = Bench::new(bit::CTRL_VQ | bit::CTRL_RX | bit::CTRL_MAC_ADDR);
    for i in 0..8 {
        bench.give(RX, &[(BUFFERS + 0x1000 * i, 2000, true)]);
    }
    let group = [1, 0, 0x5e, 0, 0, 1];
    bench.port.receive(&frame(OTHER, 60));
    bench.port.receive(&frame(group, 60));
    assert_eq!(bench.used(RX).len(), 0);
    let mut tables = vec![1, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    tables.extend_from_slice(&group);
    assert_eq!(bench.command(&tables), 0);
    bench.port.receive(&frame(group, 60));
    assert_eq!(bench.used(RX).len(), 1);
    assert_eq!(bench.command(&[0, 0, 1]), 0);
    bench.port.receive(&frame(OTHER, 60));
    assert_eq!(bench.used(RX).len(), 2);
    assert_eq!(bench.command(&[&[1, 1][..], &OTHER].concat()), 0);
    assert_eq!(bench.card.lock().device.config()[..6], OTHER);
    assert_eq!(bench.command(&[9, 9]), 1);
    assert_eq!(bench.command(&[1, 0, 255, 255, 255, 255]), 1);
}

/// A TCP packet of IPv4 with so much data and a checksum field that is to be filled in.
fn tcp_packet(data: usize) -> Vec<u8> {
    let mut packet = frame(MAC, 54 + data);
    packet[14..54].fill(0);
    packet[14] = 0x45;
    packet[16..18].copy_from_slice(&(40 + data as u16).to_be_bytes());
    packet[23] = 6;
    packet[26..34].copy_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2]);
    packet[46] = 5 << 4;
    packet
}

#[test]
fn tcp_packets_are_cut_unless_the_network_takes_them_whole() {
    let mut bench = Bench::new(bit::CSUM | bit::HOST_TSO4);
    let header = [NEEDS_CSUM, GSO_TCP4, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    let packet = tcp_packet(2500);
    bench.send(&header, &packet);
    assert_eq!(bench.wire.frames.lock().iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
    bench.wire.whole.store(true, Ordering::SeqCst);
    bench.send(&header, &packet);
    let frames = bench.wire.frames.lock();
    assert_eq!((frames.len(), frames[3].len()), (4, packet.len()));
    let pseudo = sum(&frames[3][26..34], 6 + 2520);
    assert_eq!(sum(&frames[3][34..], pseudo), 0xffff);
}

#[test]
fn a_guest_that_takes_packets_whole_is_told_how_they_were_cut() {
    let mut bench = Bench::new(bit::MRG_RXBUF | bit::GUEST_CSUM | bit::GUEST_TSO4);
    assert!(bench.port.takes_packets());
    assert!(!Bench::new(bit::MRG_RXBUF).port.takes_packets());
    let packet = tcp_packet(5000);
    // The second buffer begins inside the headers.
    for (i, len) in [(0, 40), (1, 4000), (2, 4000)] {
        bench.give(RX, &[(BUFFERS + 0x1000 * i, len, true)]);
    }
    assert!(bench.port.receive_packet(&packet, 1460));
    assert_eq!(bench.used(RX), [40, 4000, 1026]);
    let mut got = bench.bytes(BUFFERS, 40);
    got.extend(bench.bytes(BUFFERS + 0x1000, 4000));
    got.extend(bench.bytes(BUFFERS + 0x2000, 1026));
    assert_eq!(got[..12], [NEEDS_CSUM, GSO_TCP4, 54, 0, 0xb4, 5, 34, 0, 16, 0, 3, 0]);
    let pseudo = sum(&packet[26..34], 6 + 5020) as u16;
    assert_eq!(got[12 + 50..12 + 52], pseudo.to_be_bytes());
    assert_eq!((&got[12..62], &got[64..]), (&packet[..50], &packet[52..]));
    // What is no such packet is lost.
    bench.give(RX, &[(BUFFERS, 8000, true)]);
    assert!(bench.port.receive_packet(&frame(MAC, 3000), 1460));
}

#[test]
fn a_full_back_end_holds_the_guest_up() {
    let mut bench = Bench::new(0);
    bench.wire.room.store(1, Ordering::SeqCst);
    for _ in 0..3 {
        bench.send(&[], &frame(OTHER, 60));
    }
    assert_eq!(bench.wire.frames.lock().len(), 1);
    bench.wire.room.store(u32::MAX, Ordering::SeqCst);
    bench.port.ready();
    assert_eq!(bench.wire.frames.lock().len(), 3);
    assert_eq!(bench.used(TX).len(), 3);
}

#[test]
fn a_driver_that_goes_by_event_indexes_is_told_to_notify() {
    let mut bench = Bench::new(bit::CTRL_VQ | bit::CTRL_RX | feature::EVENT_IDX);
    let event = |bench: &Bench, queue: usize, size: u64| {
        let bytes = bench.bytes(QUEUES + 0x8000 * queue as u64 + 0x6004 + 8 * size, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    };
    for count in 1..=3 {
        assert_eq!(bench.command(&[0, 1, 1]), 0);
        bench.send(&[], &frame(OTHER, 60));
        assert_eq!((event(&bench, CONTROL, 64), event(&bench, TX, 256)), (count, count));
    }
    bench.give(RX, &[(BUFFERS, 100, true)]);
    assert!(bench.port.receive(&frame(MAC, 60)));
    assert!(!bench.port.receive(&frame(MAC, 60)));
    assert_eq!(event(&bench, RX, 256), 1);
}

#[test]
fn the_cable_shows_in_the_status() {
    let bench = Bench::new(bit::STATUS);
    let status = |bench: &Bench| {
        let mut bytes = [0; 2];
        bench.card.lock().mmio_read(0, 0x2006, &mut bytes);
        bytes[0]
    };
    assert_eq!(status(&bench), 1);
    bench.port.set_link(false);
    assert_eq!(status(&bench), 0);
    let mut isr = [0];
    bench.card.lock().mmio_read(0, 0x1000, &mut isr);
    assert_eq!(isr[0], 2);
}

#[test]
fn saved_states_are_equal_after_the_way_there_and_back() {
    let mut bench = Bench::new(bit::CTRL_VQ | bit::CTRL_RX);
    bench.wire.room.store(0, Ordering::SeqCst);
    bench.send(&[], &frame(OTHER, 60));
    bench.command(&[0, 1, 1]);
    let save = |card: &Mutex<Card>| {
        let mut out = Writer::new();
        card.lock().save(&mut out);
        out.into_bytes()
    };
    let before = save(&bench.card);
    let other = Bench::new(0);
    other.card.lock().load(Reader::new("virtio-net", 1, &before)).unwrap();
    assert_eq!(save(&other.card), before);
    for len in 0..before.len() {
        assert!(other.card.lock().load(Reader::new("virtio-net", 1, &before[..len])).is_err(), "{len}");
    }
    Device::reset(&mut *other.card.lock());
    assert_ne!(save(&other.card), before);
}
