use ssm::{Reader, Saveable, Writer};
use tm::Clock;
use vbox_types::ByteSize;

use super::*;
use crate::testing::{Line, MAC, Wire, frame_to, memory};

const TX_RING: u64 = 0x1000;
const RX_RING: u64 = 0x2000;
const BUFFERS: u64 = 0x1_0000;

struct Bench {
    card: Arc<Mutex<E1000>>,
    pgm: Arc<Pgm>,
    wire: Arc<Wire>,
    line: Arc<Line>,
    timers: Arc<TimerQueue>,
}

impl Bench {
    fn new(model: Model) -> Self {
        let pgm = memory(ByteSize::mib(1));
        let timers = TimerQueue::new(Clock::manual());
        let (line, irq) = Line::pair();
        let card = E1000::new(model, MAC, true, Wiring { pgm: pgm.clone(), irq }, &timers);
        let wire = Wire::new();
        card.lock().connect(Some(wire.clone()));
        card.lock().reset();
        Self { card, pgm, wire, line, timers }
    }

    /// With rings of eight descriptors, receive buffers of 2 KiB, everything on.
    fn running() -> Self {
        let bench = Self::new(Model::I82540Em);
        for i in 0..8 {
            bench.pgm.write(GuestPhys(RX_RING + 16 * i), &(BUFFERS + 0x1000 * i).to_le_bytes());
        }
        for (at, value) in [
            (reg::TDBAL, TX_RING as u32),
            (reg::TDLEN, 128),
            (reg::TCTL, tctl::EN),
            (reg::RDBAL, RX_RING as u32),
            (reg::RDLEN, 128),
            (reg::RDT, 7),
            (reg::RCTL, rctl::EN | rctl::BAM),
        ] {
            bench.write(at, value);
        }
        bench
    }

    fn read(&self, at: u32) -> u32 {
        let mut data = [0; 4];
        self.card.lock().mmio_read(0, at.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, at: u32, value: u32) {
        self.card.lock().mmio_write(0, at.into(), &value.to_le_bytes());
    }

    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut data);
        data
    }

    /// Puts descriptors into the transmit ring from its start and tells the card.
    fn transmit(&self, descriptors: &[(u64, u64)]) {
        for (i, (low, high)) in descriptors.iter().enumerate() {
            let at = TX_RING + 16 * i as u64;
            self.pgm.write(GuestPhys(at), &low.to_le_bytes());
            self.pgm.write(GuestPhys(at + 8), &high.to_le_bytes());
        }
        self.write(reg::TDT, descriptors.len() as u32);
    }

    fn receive(&self, frame: &[u8]) -> bool {
        E1000::port(&self.card).receive(frame)
    }
}

const fn command(bits: u8) -> u64 {
    (bits as u64) << 24
}

#[test]
fn the_eeprom_gives_address_and_checksum_over_its_serial_bus() {
    let bench = Bench::new(Model::I82540Em);
    let read_word = |address: u32| {
        bench.write(reg::EECD, 0);
        bench.write(reg::EECD, eecd::CS);
        let clock = |bit: u32| {
            let level = eecd::CS | (bit * eecd::DI);
            bench.write(reg::EECD, level);
            bench.write(reg::EECD, level | eecd::SK);
            let out = bench.read(reg::EECD) & eecd::DO != 0;
            bench.write(reg::EECD, level);
            u16::from(out)
        };
        for i in (0..9).rev() {
            clock((0b110 << 6 | address) >> i & 1);
        }
        (0..16).fold(0u16, |word, _| word << 1 | clock(0))
    };
    assert_eq!([read_word(0), read_word(1), read_word(2)], [0x0008, 0x1227, 0x5634]);
    let total = (0..64).map(read_word).fold(0u16, |sum, word| sum.wrapping_add(word));
    assert_eq!(total, 0xbaba);
    bench.write(reg::EERD, 0x0100 | 1);
    assert_eq!(bench.read(reg::EERD), 0x1227_0110);
}

#[test]
fn the_phy_answers_at_address_one_and_tells_of_the_link() {
    let bench = Bench::new(Model::I82540Em);
    let phy = |register: u32| {
        bench.write(reg::MDIC, 2 << 26 | 1 << 21 | register << 16);
        bench.read(reg::MDIC) & 0xffff
    };
    assert_eq!((phy(2), phy(3)), (0x0141, 0x0c20));
    assert_eq!(phy(1) & 0x24, 0x24);
    E1000::port(&bench.card).set_link(false);
    assert_eq!(phy(1) & 0x24, 0);
    assert_eq!(bench.read(reg::STATUS) & status::LU, 0);
    assert_eq!(bench.read(reg::ICR), cause::LSC);
    bench.write(reg::MDIC, 2 << 26 | 2 << 21);
    assert_ne!(bench.read(reg::MDIC) & 1 << 30, 0);
}

#[test]
fn drivers_of_the_82543_move_the_phys_bits_themselves() {
    let bench = Bench::new(Model::I82543Gc);
    let out = |bit: u32| {
        let level = ctrl::MDIO_DIR | (bit * ctrl::MDIO);
        bench.write(reg::CTRL, level);
        bench.write(reg::CTRL, level | ctrl::MDC);
        bench.write(reg::CTRL, level);
    };
    let clock_in = || {
        bench.write(reg::CTRL, ctrl::MDC);
        let bit = bench.read(reg::CTRL) & ctrl::MDIO != 0;
        bench.write(reg::CTRL, 0);
        u16::from(bit)
    };
    let read = |register: u32| {
        (0..32).for_each(|_| out(1));
        let header = 1 << 12 | 2 << 10 | 1 << 5 | register;
        (0..14).rev().for_each(|i| out(header >> i & 1));
        clock_in();
        let value = (0..16).fold(0, |value, _| value << 1 | clock_in());
        clock_in();
        value
    };
    assert_eq!((read(2), read(3)), (0x0141, 0x0c50));
    (0..32).for_each(|_| out(1));
    let frame: u32 = 1 << 30 | 1 << 28 | 1 << 23 | 9 << 18 | 2 << 16 | 0x1234;
    (0..32).rev().for_each(|i| out(frame >> i & 1));
    assert_eq!(read(9), 0x1234);
}

#[test]
fn a_legacy_packet_of_two_descriptors_goes_out_as_one_frame() {
    let bench = Bench::running();
    let frame = frame_to([0xff; 6], 100);
    bench.pgm.write(GuestPhys(BUFFERS), &frame);
    bench.write(reg::IMS, cause::TXDW);
    let rest = command(dcmd::EOP | dcmd::RS);
    bench.transmit(&[(BUFFERS, 40), (BUFFERS + 40, 60 | rest)]);
    assert_eq!(*bench.wire.frames.lock(), [frame]);
    assert_eq!(bench.read(reg::TDH), 2);
    assert_eq!(bench.guest(TX_RING + 12, 1)[0] & 1, 0);
    assert_eq!(bench.guest(TX_RING + 28, 1)[0] & 1, 1);
    assert!(bench.line.level.load(Ordering::SeqCst));
    assert_eq!(bench.read(reg::ICR), cause::TXDW | cause::TXQE);
    assert!(!bench.line.level.load(Ordering::SeqCst));
    assert_eq!((bench.read(reg::GPTC), bench.read(reg::GPTC)), (1, 0));
}

/// An IPv4/TCP packet with 54 bytes of headers and what a driver prepares for segmentation.
fn tcp_packet(payload: usize) -> Vec<u8> {
    let mut packet = vec![0; 54 + payload];
    packet[..6].fill(0xff);
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[14..34]
        .copy_from_slice(&[0x45, 0, 0, 0, 0x10, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
    packet[38..42].copy_from_slice(&1000u32.to_be_bytes());
    // FIN, PSH, ACK; header of 20 bytes.
    packet[46..48].copy_from_slice(&[0x50, 0x19]);
    let mut pseudo = packet[26..34].to_vec();
    pseudo.extend([0, 6]);
    let sum = ether::checksum::ones_sum(&pseudo);
    packet[50..52].copy_from_slice(&sum.to_be_bytes());
    packet[54..].iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
    packet
}

fn context(mss: u64, payload: u64) -> (u64, u64) {
    let low = 14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40;
    let bits = dcmd::TUCMD_TCP | dcmd::TUCMD_IP | dcmd::TSE | dcmd::DEXT;
    (low, payload | command(bits) | 54 << 40 | mss << 48)
}

#[test]
fn segmentation_makes_frames_whose_checksums_are_right() {
    let bench = Bench::running();
    let packet = tcp_packet(2500);
    bench.pgm.write(GuestPhys(BUFFERS), &packet);
    let data = |len: u64, bits: u8| len | 1 << 20 | command(bits | dcmd::DEXT | dcmd::TSE) | 3 << 40;
    bench.transmit(&[
        context(1000, 2500),
        (BUFFERS, data(54, 0)),
        (BUFFERS + 54, data(2500, dcmd::EOP | dcmd::RS)),
    ]);
    let frames = bench.wire.frames.lock();
    assert_eq!(frames.iter().map(Vec::len).collect::<Vec<_>>(), [1054, 1054, 554]);
    for (i, frame) in frames.iter().enumerate() {
        assert_eq!(packet::verify(frame), (Some(true), Some(true)), "frame {i}");
        assert_eq!(frame[38..42], (1000 + 1000 * i as u32).to_be_bytes());
        assert_eq!(frame[19], i as u8);
        assert_eq!(frame[47], if i == 2 { 0x19 } else { 0x10 });
    }
    let sent: Vec<u8> = frames.iter().flat_map(|f| f[54..].to_vec()).collect();
    assert_eq!(sent, packet[54..]);
}

#[test]
fn a_network_that_takes_packets_whole_gets_them_so() {
    let bench = Bench::running();
    bench.wire.whole.store(true, Ordering::SeqCst);
    let packet = tcp_packet(2500);
    bench.pgm.write(GuestPhys(BUFFERS), &packet);
    let data = 2554 | 1 << 20 | command(dcmd::EOP | dcmd::RS | dcmd::DEXT | dcmd::TSE) | 3 << 40;
    bench.transmit(&[context(1000, 2500), (BUFFERS, data)]);
    let frames = bench.wire.frames.lock();
    assert_eq!(frames.len(), 1);
    assert_eq!(packet::verify(&frames[0]), (Some(true), Some(true)));
    assert_eq!(frames[0][54..], packet[54..]);
}

#[test]
fn a_context_that_makes_no_sense_drops_the_packet_and_nothing_else() {
    let bench = Bench::running();
    bench.pgm.write(GuestPhys(BUFFERS), &tcp_packet(500));
    let data = 554 | 1 << 20 | command(dcmd::EOP | dcmd::RS | dcmd::DEXT | dcmd::TSE);
    bench.transmit(&[context(1, 500), (BUFFERS, data), (BUFFERS, 60 | command(dcmd::EOP))]);
    assert_eq!(bench.wire.frames.lock().len(), 1);
    assert_eq!(bench.read(reg::TDH), 3);
}

#[test]
fn transmission_waits_for_the_network() {
    let bench = Bench::running();
    bench.wire.room.store(1, Ordering::SeqCst);
    let one = (BUFFERS, 60 | command(dcmd::EOP | dcmd::RS));
    bench.transmit(&[one; 4]);
    assert_eq!(bench.wire.frames.lock().len(), 1);
    bench.wire.room.store(8, Ordering::SeqCst);
    E1000::port(&bench.card).ready();
    assert_eq!(bench.wire.frames.lock().len(), 4);
    assert_eq!(bench.read(reg::TDH), 4);
}

#[test]
fn a_received_frame_lands_with_its_check_sequence() {
    let bench = Bench::running();
    bench.write(reg::IMS, cause::RXT0);
    let frame = frame_to(MAC, 100);
    assert!(bench.receive(&frame));
    let got = bench.guest(BUFFERS, 104);
    assert_eq!(got[..100], frame);
    assert_eq!(got[100..], ether::checksum::crc32(&frame).to_le_bytes());
    let descriptor = bench.guest(RX_RING + 8, 8);
    assert_eq!(descriptor[..2], [104, 0]);
    assert_eq!(descriptor[4], rxs::DD | rxs::EOP | rxs::IXSM);
    assert_eq!(bench.read(reg::RDH), 1);
    assert!(bench.line.level.load(Ordering::SeqCst));
}

#[test]
fn filters_take_what_the_guest_asked_for() {
    let bench = Bench::running();
    let received = |dst: [u8; 6]| {
        let before = bench.read(reg::RDH);
        assert!(bench.receive(&frame_to(dst, 60)));
        bench.read(reg::RDH) != before
    };
    let group = [0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb];
    assert!(received(MAC));
    assert!(received([0xff; 6]));
    assert!(!received([2, 0, 0, 0, 0, 9]));
    assert!(!received(group));
    // The hash is bits 47 to 36: 0xfb0.
    bench.write(reg::MTA + 4 * (0xfb0 >> 5), 1 << (0xfb0 & 31));
    assert!(received(group));
    bench.write(reg::RCTL, rctl::EN | rctl::UPE);
    assert!(received([2, 0, 0, 0, 0, 9]));
    assert!(!received([0xff; 6]));
}

#[test]
fn vlan_tags_are_filtered_and_stripped() {
    let bench = Bench::running();
    bench.write(reg::CTRL, ctrl::FD | ctrl::SLU | ctrl::VME);
    bench.write(reg::RCTL, rctl::EN | rctl::VFE);
    bench.write(reg::VFTA, 1 << 5);
    let mut frame = frame_to(MAC, 100);
    frame.splice(12..12, [0x81, 0x00, 0x20, 0x06]);
    assert!(bench.receive(&frame));
    assert_eq!(bench.read(reg::RDH), 0);
    frame[15] = 5;
    assert!(bench.receive(&frame));
    let descriptor = bench.guest(RX_RING + 8, 8);
    assert_eq!(descriptor[..2], [104, 0]);
    assert_ne!(descriptor[4] & rxs::VP, 0);
    assert_eq!(descriptor[6..], [0x05, 0x20]);
    assert_eq!(bench.guest(BUFFERS + 12, 2), [0x88, 0xb5]);
}

#[test]
fn a_full_ring_refuses_and_resumes() {
    let bench = Bench::running();
    let frame = frame_to(MAC, 60);
    assert!((0..7).all(|_| bench.receive(&frame)));
    assert!(!bench.receive(&frame));
    assert_eq!(bench.wire.resumed.load(Ordering::SeqCst), 0);
    bench.write(reg::RDT, 2);
    assert_eq!(bench.wire.resumed.load(Ordering::SeqCst), 1);
    assert!(bench.receive(&frame));
}

#[test]
fn a_long_frame_takes_several_buffers() {
    let bench = Bench::running();
    bench.write(reg::RCTL, rctl::EN | rctl::LPE | rctl::SECRC);
    assert!(bench.receive(&frame_to(MAC, 5000)));
    assert_eq!(bench.read(reg::RDH), 3);
    let status = |i: u64| bench.guest(RX_RING + 16 * i + 12, 1)[0] & rxs::EOP != 0;
    assert_eq!([status(0), status(1), status(2)], [false, false, true]);
}

#[test]
fn rings_that_make_no_sense_are_left_alone() {
    let bench = Bench::running();
    for (len, head, tail) in [(0, 0, 1), (128, 9, 1), (128, 0, 8), (128, 0xffff, 0xffff)] {
        bench.write(reg::TDLEN, len);
        bench.write(reg::TDH, head);
        bench.write(reg::TDT, tail);
        bench.write(reg::RDLEN, len);
        bench.write(reg::RDH, head);
        bench.write(reg::RDT, tail);
        assert!(!bench.receive(&frame_to(MAC, 60)));
        assert_eq!(bench.read(reg::TDH), head & 0xffff);
    }
}

#[test]
fn interrupts_keep_the_distance_that_itr_asks_for() {
    let bench = Bench::running();
    bench.write(reg::ITR, 1000);
    bench.write(reg::IMS, cause::LSC);
    bench.timers.clock().advance(1);
    bench.write(reg::ICS, cause::LSC);
    bench.read(reg::ICR);
    bench.write(reg::ICS, cause::LSC);
    assert_eq!(bench.line.rises.load(Ordering::SeqCst), 1);
    bench.timers.clock().advance(255_999);
    bench.timers.fire_due();
    assert_eq!(bench.line.rises.load(Ordering::SeqCst), 1);
    bench.timers.clock().advance(1);
    bench.timers.fire_due();
    assert_eq!(bench.line.rises.load(Ordering::SeqCst), 2);
}

#[test]
fn the_state_survives_saving_and_a_damaged_one_changes_nothing() {
    let bench = Bench::running();
    bench.wire.room.store(0, Ordering::SeqCst);
    bench.transmit(&[(BUFFERS, 60 | command(dcmd::EOP)); 2]);
    let save = |bench: &Bench| {
        let mut out = Writer::new();
        bench.card.lock().save(&mut out);
        out.into_bytes()
    };
    let bytes = save(&bench);
    let other = Bench::new(Model::I82540Em);
    other.card.lock().load(Reader::new("e1000", 1, &bytes)).unwrap();
    assert_eq!(save(&other), bytes);
    other.timers.fire_due();
    assert_eq!(other.wire.frames.lock().len(), 1);
    let before = save(&other);
    assert!(other.card.lock().load(Reader::new("e1000", 1, &bytes[..bytes.len() - 1])).is_err());
    assert_eq!(save(&other), before);
}
