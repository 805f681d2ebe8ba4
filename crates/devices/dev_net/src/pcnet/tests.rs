use ssm::{Reader, Saveable, Writer};
use tm::Clock;
use vbox_types::ByteSize;

use super::*;
use crate::testing::{Line, MAC, Wire, frame_to, memory};

const INIT: u64 = 0x800;
const TX_RING: u64 = 0x1000;
const RX_RING: u64 = 0x2000;
const BUFFERS: u64 = 0x1_0000;
/// Descriptors of each ring.
const LEN: u64 = 8;

struct Bench {
    card: Arc<Mutex<Pcnet>>,
    pgm: Arc<Pgm>,
    wire: Arc<Wire>,
    line: Arc<Line>,
    timers: Arc<TimerQueue>,
    style: u16,
}

impl Bench {
    fn new(model: Model) -> Self {
        let pgm = memory(ByteSize::mib(1));
        let timers = TimerQueue::new(Clock::manual());
        let (line, irq) = Line::pair();
        let card = Pcnet::new(model, MAC, true, Wiring { pgm: pgm.clone(), irq }, &timers);
        let wire = Wire::new();
        card.lock().connect(Some(wire.clone()));
        card.lock().reset();
        Self { card, pgm, wire, line, timers, style: 0 }
    }

    /// Started as drivers do, with rings of eight descriptors in the given style and receive buffers of `buffer` bytes.
    fn running(model: Model, style: u16, buffer: u16) -> Self {
        let mut bench = Self::new(model);
        bench.style = style;
        bench.write_bcr(bcr::SWS, style);
        let mut block = Vec::new();
        let (rx, tx) = (RX_RING as u32, TX_RING as u32);
        if style == 0 {
            block.extend(0u16.to_le_bytes());
            block.extend(MAC);
            block.extend([0; 8]);
            block.extend((rx | 3 << 29).to_le_bytes());
            block.extend((tx | 3 << 29).to_le_bytes());
        } else {
            block.extend((3u32 << 20 | 3 << 28).to_le_bytes());
            block.extend(MAC);
            block.extend([0; 10]);
            block.extend(rx.to_le_bytes());
            block.extend(tx.to_le_bytes());
        }
        bench.pgm.write(GuestPhys(INIT), &block);
        (0..LEN).for_each(|i| bench.give(i, buffer));
        bench.write_csr(csr::IADR_LOW, INIT as u16);
        bench.write_csr(csr::IADR_HIGH, 0);
        bench.write_csr(csr::FEATURES, features::MASKS | features::DPOLL);
        bench.write_csr(csr::STATUS, status::INIT);
        assert_eq!(bench.read_csr(csr::STATUS) & (status::INIT | status::IDON), status::INIT | status::IDON);
        bench.write_csr(csr::STATUS, status::IDON | status::STRT | status::IENA);
        bench
    }

    fn read(&self, at: u16, width: Width) -> u32 {
        self.card.lock().port_read(Port(0xd000 + at), width)
    }

    fn write(&self, at: u16, width: Width, value: u32) {
        self.card.lock().port_write(Port(0xd000 + at), width, value);
    }

    fn read_csr(&self, number: usize) -> u16 {
        self.write(0x12, Width::Word, number as u32);
        self.read(0x10, Width::Word) as u16
    }

    fn write_csr(&self, number: usize, value: u16) {
        self.write(0x12, Width::Word, number as u32);
        self.write(0x10, Width::Word, value.into());
    }

    fn read_bcr(&self, number: usize) -> u16 {
        self.write(0x12, Width::Word, number as u32);
        self.read(0x16, Width::Word) as u16
    }

    fn write_bcr(&self, number: usize, value: u16) {
        self.write(0x12, Width::Word, number as u32);
        self.write(0x16, Width::Word, value.into());
    }

    fn descriptor_at(&self, ring: u64, i: u64) -> u64 {
        ring + i * if self.style == 0 { 8 } else { 16 }
    }

    fn put(&self, ring: u64, i: u64, address: u64, status: u16, len: u16) {
        let count = 0xf000 | 0x1000u16.wrapping_sub(len) & 0xfff;
        let mut raw = Vec::new();
        let second = u32::from(count) | u32::from(status) << 16;
        match self.style {
            0 => {
                raw.extend((address as u16).to_le_bytes());
                raw.extend(((address >> 16) as u16 | status).to_le_bytes());
                raw.extend(count.to_le_bytes());
                raw.extend([0; 2]);
            }
            3 => [0, second, address as u32, 0].iter().for_each(|word| raw.extend(word.to_le_bytes())),
            _ => [address as u32, second, 0, 0].iter().for_each(|word| raw.extend(word.to_le_bytes())),
        }
        self.pgm.write(GuestPhys(self.descriptor_at(ring, i)), &raw);
    }

    /// Gives the card a descriptor for reception.
    fn give(&self, i: u64, len: u16) {
        self.put(RX_RING, i, BUFFERS + 0x1000 * i, dstat::OWN, len);
    }

    fn descriptor(&self, ring: u64, i: u64) -> Descriptor {
        let mut raw = [0; 16];
        let size = if self.style == 0 { 8 } else { 16 };
        self.pgm.read(GuestPhys(self.descriptor_at(ring, i)), &mut raw[..size]);
        Descriptor::from_bytes(Style::of(self.style), &raw)
    }

    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut data);
        data
    }

    fn transmit(&self, parts: &[(u64, &[u8], u16)]) {
        for (i, data, status) in parts {
            let at = BUFFERS + 0x2_0000 + 0x1000 * i;
            self.pgm.write(GuestPhys(at), data);
            self.put(TX_RING, *i, at, dstat::OWN | status, data.len() as u16);
        }
        self.write_csr(csr::STATUS, status::TDMD | status::IENA);
    }

    fn receive(&self, frame: &[u8]) -> bool {
        Pcnet::port(&self.card).receive(frame)
    }

    fn save(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.card.lock().save(&mut out);
        out.into_bytes()
    }
}

#[test]
fn the_prom_has_address_bus_checksum_and_mark() {
    let bench = Bench::new(Model::Am79C970A);
    let prom: Vec<u8> = (0..16).map(|i| bench.read(i, Width::Byte) as u8).collect();
    assert_eq!(prom[..6], MAC);
    assert_eq!((prom[9], &prom[14..]), (0x11, b"WW".as_slice()));
    let sum = prom.iter().map(|b| u16::from(*b)).sum::<u16>() - u16::from(prom[12]) - u16::from(prom[13]);
    assert_eq!(u16::from_le_bytes([prom[12], prom[13]]), sum);
    assert_eq!(Bench::new(Model::Am79C960).read(9, Width::Byte), 0);
    // It can be written while that is allowed.
    bench.write(0, Width::Byte, 0x55);
    assert_eq!(bench.read(0, Width::Byte), 8);
    bench.write_bcr(bcr::MC, bcr::APROMWE);
    bench.write(0, Width::Byte, 0x55);
    assert_eq!(bench.read(0, Width::Byte), 0x55);
}

#[test]
fn chips_are_known_by_their_numbers() {
    for (model, low, high) in
        [(Model::Am79C970A, 0x1003, 0x262), (Model::Am79C973, 0x5003, 0x262), (Model::Am79C960, 0x3003, 0)]
    {
        let bench = Bench::new(model);
        assert_eq!((bench.read_csr(88), bench.read_csr(89)), (low, high));
        assert_eq!(bench.read_csr(csr::STATUS), status::STOP);
    }
}

#[test]
fn a_double_word_to_rdp_widens_the_registers() {
    let bench = Bench::new(Model::Am79C973);
    bench.write(0x10, Width::Dword, 0);
    assert_eq!(bench.read(0x12, Width::Word), 0xffff);
    bench.write(0x14, Width::Dword, 88);
    assert_eq!(bench.read(0x10, Width::Dword), 0x0262_5003);
    assert_eq!(bench.read(0, Width::Dword), u32::from_le_bytes([MAC[0], MAC[1], MAC[2], MAC[3]]));
    assert_eq!(bench.read(0x18, Width::Dword), 0);
    assert_eq!(bench.read(0x14, Width::Dword), 0);
    // The ISA card has no such registers.
    let isa = Bench::new(Model::Am79C960);
    isa.write(0x10, Width::Dword, 0);
    assert_eq!(isa.read_csr(88), 0x3003);
}

#[test]
fn frames_are_sent_in_every_style() {
    for style in 0..=3 {
        let bench = Bench::running(Model::Am79C970A, style, 1536);
        let frame = frame_to([0xff; 6], 700);
        bench.transmit(&[
            (0, &frame[..300], dstat::STP),
            (1, &frame[300..], dstat::ENP),
            (2, &frame[..20], dstat::STP | dstat::ENP),
        ]);
        let sent = bench.wire.frames.lock().clone();
        assert_eq!(sent[0], frame, "style {style}");
        assert_eq!((sent[1].len(), &sent[1][..20]), (MIN_FRAME, &frame[..20]));
        for i in 0..3 {
            assert!(!bench.descriptor(TX_RING, i).is(dstat::OWN | dstat::ERR), "style {style}: {i}");
        }
        assert!(bench.line.level.load(Ordering::SeqCst));
        let seen = bench.read_csr(csr::STATUS);
        assert_eq!(seen & (status::TINT | status::INTR), status::TINT | status::INTR);
        bench.write_csr(csr::STATUS, status::TINT | status::IENA);
        assert!(!bench.line.level.load(Ordering::SeqCst));
    }
}

#[test]
fn frames_are_received_in_every_style() {
    for style in 0..=3 {
        let bench = Bench::running(Model::Am79C970A, style, 256);
        let frame = frame_to(MAC, 500);
        assert!(bench.receive(&frame));
        let (first, second) = (bench.descriptor(RX_RING, 0), bench.descriptor(RX_RING, 1));
        assert_eq!((first.is(dstat::OWN), first.is(dstat::STP), first.is(dstat::ENP)), (false, true, false));
        assert_eq!(
            (second.is(dstat::OWN), second.is(dstat::STP), second.is(dstat::ENP)),
            (false, false, true)
        );
        assert_eq!(second.message & 0xfff, 504, "style {style}");
        let mut got = bench.guest(BUFFERS, 256);
        got.extend(bench.guest(BUFFERS + 0x1000, 248));
        assert_eq!(got[..500], frame);
        assert_eq!(got[500..], crc32(&frame).to_le_bytes());
        assert!(bench.descriptor(RX_RING, 2).is(dstat::OWN));
        assert_ne!(bench.read_csr(csr::STATUS) & status::RINT, 0);
    }
}

#[test]
fn filters_let_in_what_the_guest_wants() {
    let multicast = [1, 0, 0x5e, 0, 0, 1];
    let bench = Bench::running(Model::Am79C973, 2, 1536);
    let taken = || {
        let before = bench.read_csr(csr::RCVRC);
        move |bench: &Bench| bench.read_csr(csr::RCVRC) != before
    };
    let accepts = |dst: [u8; 6]| {
        let changed = taken();
        assert!(bench.receive(&frame_to(dst, 60)));
        changed(&bench)
    };
    assert!(accepts(MAC) && accepts([0xff; 6]));
    assert!(!accepts([0, 1, 2, 3, 4, 5]) && !accepts(multicast));
    assert!(bench.descriptor(RX_RING, 0).is(dstat::PAM) && bench.descriptor(RX_RING, 1).is(dstat::BAM));
    let bit = (!crc32(&multicast) >> 26) as usize;
    bench.write_csr(csr::EXTENDED, extended::SPND);
    bench.write_csr(csr::LADRF + bit / 16, 1 << (bit % 16));
    bench.write_csr(csr::MODE, mode::DRCVBC | mode::DRCVPA);
    bench.write_csr(csr::EXTENDED, 0);
    assert!(accepts(multicast) && !accepts(MAC) && !accepts([0xff; 6]));
    bench.write_csr(csr::EXTENDED, extended::SPND);
    bench.write_csr(csr::MODE, mode::PROM);
    assert!(!accepts([2; 6]), "suspended");
    bench.write_csr(csr::EXTENDED, 0);
    assert!(accepts([2; 6]));
}

#[test]
fn padding_of_802_3_frames_is_stripped_on_demand() {
    let bench = Bench::running(Model::Am79C970A, 2, 1536);
    bench.write_csr(csr::FEATURES, features::MASKS | features::ASTRP_RCV | features::DPOLL);
    let mut frame = frame_to(MAC, 60);
    frame[12..14].copy_from_slice(&[0, 20]);
    assert!(bench.receive(&frame));
    assert_eq!(bench.descriptor(RX_RING, 0).message & 0xfff, 34);
}

#[test]
fn a_frame_waits_for_descriptors_that_come_without_a_word() {
    let bench = Bench::running(Model::Am79C970A, 3, 1536);
    let frame = frame_to(MAC, 60);
    assert!((0..LEN).all(|_| bench.receive(&frame)));
    assert!(!bench.receive(&frame));
    bench.read_csr(csr::STATUS);
    assert_eq!(bench.wire.resumed.load(Ordering::SeqCst), 0);
    bench.give(0, 1536);
    bench.timers.clock().advance(POLL);
    bench.timers.fire_due();
    assert_eq!(bench.wire.resumed.load(Ordering::SeqCst), 1);
    assert!(bench.receive(&frame));
}

#[test]
fn the_transmit_ring_is_polled_unless_the_guest_says_no() {
    let bench = Bench::running(Model::Am79C970A, 2, 1536);
    let frame = frame_to([0xff; 6], 60);
    bench.pgm.write(GuestPhys(BUFFERS + 0x2_0000), &frame);
    bench.put(TX_RING, 0, BUFFERS + 0x2_0000, dstat::OWN | dstat::STP | dstat::ENP, 60);
    bench.timers.clock().advance(POLL_IDLE);
    bench.timers.fire_due();
    assert!(bench.wire.frames.lock().is_empty());
    bench.write_csr(csr::FEATURES, features::MASKS);
    bench.timers.clock().advance(POLL);
    bench.timers.fire_due();
    assert_eq!(*bench.wire.frames.lock(), [frame]);
}

#[test]
fn errors_of_transmission_are_told() {
    let bench = Bench::running(Model::Am79C970A, 2, 1536);
    let frame = frame_to([0xff; 6], 100);
    // No cable.
    Pcnet::port(&bench.card).set_link(false);
    bench.transmit(&[(0, &frame, dstat::STP | dstat::ENP)]);
    let lost = bench.descriptor(TX_RING, 0);
    assert!(lost.is(dstat::ERR) && lost.message >> 16 == u32::from(terr::LCAR));
    assert_eq!(bench.read_csr(csr::STATUS) & (status::CERR | status::ERR), status::CERR | status::ERR);
    // A packet without an end stops transmission.
    Pcnet::port(&bench.card).set_link(true);
    bench.transmit(&[(1, &frame, dstat::STP)]);
    let cut = bench.descriptor(TX_RING, 1);
    assert!(cut.is(dstat::ERR) && cut.message >> 16 == u32::from(terr::BUFF | terr::UFLO));
    assert_eq!(bench.read_csr(csr::STATUS) & status::TXON, 0);
    assert!(bench.wire.frames.lock().is_empty());
}

#[test]
fn a_full_back_end_holds_transmission() {
    let bench = Bench::running(Model::Am79C973, 2, 1536);
    bench.wire.room.store(0, Ordering::SeqCst);
    let frame = frame_to([0xff; 6], 100);
    bench.transmit(&[(0, &frame, dstat::STP | dstat::ENP), (1, &frame, dstat::STP | dstat::ENP)]);
    assert!(bench.descriptor(TX_RING, 1).is(dstat::OWN));
    bench.wire.room.store(8, Ordering::SeqCst);
    Pcnet::port(&bench.card).ready();
    assert_eq!(bench.wire.frames.lock().len(), 2);
    assert!(!bench.descriptor(TX_RING, 1).is(dstat::OWN));
}

#[test]
fn loopback_brings_frames_back_with_their_check_sequence() {
    let bench = Bench::running(Model::Am79C970A, 2, 1536);
    bench.write_csr(csr::EXTENDED, extended::SPND);
    bench.write_csr(csr::MODE, mode::LOOP);
    bench.write_csr(csr::EXTENDED, 0);
    let frame = frame_to(MAC, 64);
    bench.transmit(&[(0, &frame, dstat::STP | dstat::ENP)]);
    assert!(bench.wire.frames.lock().is_empty());
    assert_eq!(bench.guest(BUFFERS, 64), frame);
    assert_eq!(bench.descriptor(RX_RING, 0).message & 0xfff, 68);
}

#[test]
fn the_link_shows_in_led_and_phy() {
    let bench = Bench::new(Model::Am79C973);
    let phy = |register: u16| {
        bench.write_bcr(bcr::MIIADDR, register);
        bench.read_bcr(bcr::MIIMDR)
    };
    assert_eq!((phy(2), phy(3)), (0x0022, 0x561b));
    assert_eq!((phy(1), phy(5), bench.read_bcr(bcr::LNKST)), (0x786d, 0xc5e1, 0x80c0));
    Pcnet::port(&bench.card).set_link(false);
    assert_eq!((phy(1) & 0x24, phy(5), bench.read_bcr(bcr::LNKST)), (0, 0, 0x00c0));
    // Other addresses have no PHY, other chips none at all.
    assert_eq!(phy(1 << 5 | 1), 0xffff);
    let old = Bench::new(Model::Am79C970A);
    old.write_bcr(bcr::MIIADDR, 1);
    assert_eq!(old.read_bcr(bcr::MIIMDR), 0xffff);
}

#[test]
fn the_software_timer_interrupts_again_and_again() {
    let bench = Bench::running(Model::Am79C973, 2, 1536);
    bench.write_csr(csr::EXTENDED2, extended2::STINTE);
    bench.write_bcr(bcr::STVAL, 10);
    for _ in 0..2 {
        bench.timers.clock().advance(10 * SOFTWARE_TICK);
        bench.timers.fire_due();
        assert!(bench.line.level.load(Ordering::SeqCst));
        bench.write_csr(csr::EXTENDED2, extended2::STINTE | extended2::STINT);
        assert!(!bench.line.level.load(Ordering::SeqCst));
    }
}

#[test]
fn flags_that_the_guest_has_not_read_stay() {
    let bench = Bench::running(Model::Am79C970A, 2, 1536);
    assert!(bench.receive(&frame_to(MAC, 60)));
    bench.write_csr(csr::STATUS, status::FLAGS | status::IENA);
    assert_ne!(bench.read_csr(csr::STATUS) & status::RINT, 0);
    bench.write_csr(csr::STATUS, status::FLAGS | status::IENA);
    assert_eq!(bench.read_csr(csr::STATUS) & status::RINT, 0);
}

#[test]
fn rings_and_descriptors_that_make_no_sense_do_no_harm() {
    let bench = Bench::running(Model::Am79C970A, 2, 16);
    // All buffers together are too small.
    assert!(bench.receive(&frame_to(MAC, 1500)));
    assert!(bench.descriptor(RX_RING, 0).is(dstat::OWN));
    // The ones are missing.
    bench.pgm.write(GuestPhys(bench.descriptor_at(TX_RING, 0) + 4), &[0, 0]);
    bench.pgm.write(GuestPhys(bench.descriptor_at(TX_RING, 0) + 6), &(dstat::OWN | dstat::STP).to_le_bytes());
    bench.write_csr(csr::STATUS, status::TDMD | status::IENA);
    assert!(bench.wire.frames.lock().is_empty());
    // Lengths and counters written by hand stay within bounds.
    bench.write_csr(csr::STATUS, status::STOP);
    for number in [csr::RCVRL, csr::XMTRL, csr::RCVRC, csr::XMTRC] {
        bench.write_csr(number, 1);
        bench.write_csr(number, 0);
    }
    bench.write_csr(csr::BADR_HIGH, 0xffff);
    bench.write_csr(csr::BADX_HIGH, 0xffff);
    bench.write_csr(csr::STATUS, status::STRT);
    bench.write_csr(csr::STATUS, status::TDMD);
    bench.receive(&frame_to([0xff; 6], 60));
}

#[test]
fn the_state_survives_saving_and_a_damaged_one_changes_nothing() {
    let bench = Bench::running(Model::Am79C973, 3, 1536);
    bench.wire.room.store(0, Ordering::SeqCst);
    bench.write_bcr(bcr::STVAL, 10);
    bench.transmit(&[(0, &frame_to([0xff; 6], 100), dstat::STP | dstat::ENP)]);
    let bytes = bench.save();
    let other = Bench::new(Model::Am79C973);
    other.card.lock().load(Reader::new("pcnet", 1, &bytes)).unwrap();
    assert_eq!(other.save(), bytes);
    assert!(other.line.level.load(Ordering::SeqCst));
    other.timers.fire_due();
    assert_eq!(other.wire.frames.lock().len(), 1);
    let before = other.save();
    for len in 0..bytes.len() {
        assert!(other.card.lock().load(Reader::new("pcnet", 1, &bytes[..len])).is_err());
    }
    assert_eq!(other.save(), before);
}

#[test]
fn a_ring_that_cannot_be_written_leaves_the_timers_thread_to_others() {
    let bench = Bench::running(Model::Am79C973, 2, 1000);
    bench.write_csr(csr::STATUS, status::STOP);
    // No memory is there: ones, which are frames of one byte for ever.
    bench.pgm.write(GuestPhys(INIT + 24), &0x80_0000u32.to_le_bytes());
    bench.write_csr(csr::STATUS, status::INIT | status::STRT);
    bench.write_csr(csr::STATUS, status::TDMD);
    let now = bench.timers.clock().now();
    assert_eq!(bench.timers.fire_due(), Some(now + TX_PAUSE));
    bench.timers.clock().advance(TX_PAUSE);
    assert_eq!(bench.timers.fire_due(), Some(now + 2 * TX_PAUSE));
}

#[test]
fn random_accesses_and_frames_do_no_harm() {
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut frames = 0;
    for model in [Model::Am79C970A, Model::Am79C973, Model::Am79C960] {
        let bench = Bench::running(model, if model.is_pci() { 2 } else { 0 }, 600);
        for _ in 0..40_000 {
            let value = next();
            let (number, word) = ((value >> 8) as usize & 0x7f, (value >> 16) as u16);
            match value & 15 {
                0 => bench.write_csr(number, word),
                1 => bench.write_bcr(number, word),
                // Rings that work now and then.
                2 => {
                    bench.write_csr(csr::STATUS, status::STOP);
                    bench.write_bcr(bcr::SWS, bench.style);
                    bench.write_csr(csr::IADR_LOW, INIT as u16);
                    bench.write_csr(csr::IADR_HIGH, 0);
                    bench.write_csr(csr::STATUS, status::INIT | status::STRT);
                }
                3 => bench.write_csr(csr::STATUS, word),
                4 => {
                    bench.read_csr(number);
                    bench.read_bcr(number);
                }
                5 => bench.pgm.write(GuestPhys(value >> 20 & 0x3fff), &value.to_le_bytes()),
                6..=9 => bench.give(value >> 8 & 7, word & 0xfff),
                10 | 11 => {
                    bench.put(TX_RING, value >> 8 & 7, BUFFERS, dstat::OWN | word & 0x7fff, word & 0x3ff)
                }
                12 => drop(bench.receive(&frame_to([0xff; 6], usize::from(word % 5000)))),
                13 => {
                    bench.timers.clock().advance(u64::from(word) << 8);
                    bench.timers.fire_due();
                }
                14 => {
                    let width = [Width::Byte, Width::Word, Width::Dword][number % 3];
                    bench.write(word & 31, width, value as u32 >> 8);
                    bench.read(number as u16 & 31, width);
                }
                _ if word & 0xff == 0 => bench.card.lock().reset(),
                _ if word & 7 == 0 => {
                    let bytes = bench.save();
                    let other = Bench::new(model);
                    other.card.lock().load(Reader::new("pcnet", 1, &bytes)).unwrap();
                    assert_eq!(other.save(), bytes);
                }
                _ => Pcnet::port(&bench.card).set_link(word & 8 != 0),
            }
        }
        frames += bench.wire.frames.lock().len();
    }
    assert!(frames > 100, "only {frames} frames were sent");
}
