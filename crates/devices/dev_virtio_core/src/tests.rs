use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pdm::doorbell::{BellId, Doorbell, Place, Watcher};
use pdm::irq::{IrqLine, IrqPin, IrqSink};
use pdm::msix::MsiSink;
use pdm::pci::{DevFn, PciBus};
use pdm::{Device, Iom, MmioDevice, PortIo, Width};
use pgm::{Backing, HostMemory, Layer, MmioHandler, Pgm};
use ssm::{Error, Reader, Saveable, Writer};
use vbox_types::{ByteSize, GuestPhys, Port, VcpuId};

use super::*;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;

fn memory() -> Arc<Pgm> {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("test", ByteSize::mib(1)).unwrap());
    pgm.map(GuestPhys(0), 1 << 20, Layer::Ram, Backing::ram(ram, 0));
    pgm
}

fn descriptor(pgm: &Pgm, table: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&next.to_le_bytes());
    pgm.write(GuestPhys(table + 16 * index), &bytes);
}

/// Makes the chain at `head` available as number `index`.
fn offer(pgm: &Pgm, index: u16, head: u16) {
    pgm.write(GuestPhys(AVAILABLE + 4 + 2 * u64::from(index % SIZE)), &head.to_le_bytes());
    pgm.write(GuestPhys(AVAILABLE + 2), &(index + 1).to_le_bytes());
}

fn queue() -> Queue {
    let mut queue = Queue::new(SIZE);
    (queue.descriptors, queue.available, queue.used, queue.ready) = (TABLE, AVAILABLE, USED, true);
    queue
}

#[test]
fn a_chain_is_taken_read_written_and_given_back() {
    let (pgm, mut queue) = (memory(), queue());
    descriptor(&pgm, TABLE, 2, 0x8000, 4, 1, 5);
    descriptor(&pgm, TABLE, 5, 0x9000, 3, 1 | 2, 6);
    descriptor(&pgm, TABLE, 6, 0xa000, 10, 2, 0);
    pgm.write(GuestPhys(0x8000), b"abcd");
    offer(&pgm, 0, 2);
    let chain = queue.pop(&pgm).unwrap();
    assert_eq!((chain.head, chain.readable_len(), chain.writable_len()), (2, 4, 13));
    let mut data = Vec::new();
    assert!(chain.gather(&pgm, 1, 100, &mut data));
    assert_eq!(data, b"bcd");
    assert!(!chain.gather(&pgm, 0, 2, &mut Vec::new()));
    assert_eq!(chain.scatter(&pgm, 1, b"12345"), 5);
    let mut out = [0; 3];
    pgm.read(GuestPhys(0x9000), &mut out);
    assert_eq!(&out, b"\x0012");
    queue.push(&pgm, chain.head, 6);
    assert!(queue.publish(&pgm));
    assert!(!queue.publish(&pgm));
    let mut used = [0; 10];
    pgm.read(GuestPhys(USED + 2), &mut used);
    assert_eq!(used, [1, 0, 2, 0, 0, 0, 6, 0, 0, 0]);
    assert!(queue.pop(&pgm).is_none() && !queue.is_broken());
}

#[test]
fn a_table_of_indirect_descriptors_is_a_chain() {
    let (pgm, mut queue) = (memory(), queue());
    descriptor(&pgm, TABLE, 0, 0x8000, 32, 4, 0);
    descriptor(&pgm, 0x8000, 0, 0x9000, 1, 1, 1);
    descriptor(&pgm, 0x8000, 1, 0x9100, 2, 2, 0);
    offer(&pgm, 0, 0);
    let chain = queue.pop(&pgm).unwrap();
    assert_eq!(chain.readable, [Region { address: 0x9000, len: 1 }]);
    assert_eq!(chain.writable, [Region { address: 0x9100, len: 2 }]);
}

#[test]
fn queues_that_make_no_sense_stop() {
    type Damage = fn(&Pgm);
    let damages: [(&str, Damage); 6] = [
        ("a loop", |pgm| descriptor(pgm, TABLE, 0, 0x8000, 1, 1, 0)),
        ("a next descriptor outside", |pgm| descriptor(pgm, TABLE, 0, 0x8000, 1, 1, SIZE)),
        ("reading after writing", |pgm| {
            descriptor(pgm, TABLE, 0, 0x8000, 1, 1 | 2, 1);
            descriptor(pgm, TABLE, 1, 0x8000, 1, 0, 0);
        }),
        ("an indirect table of no size", |pgm| descriptor(pgm, TABLE, 0, 0x8000, 0, 4, 0)),
        ("tables in tables", |pgm| {
            descriptor(pgm, TABLE, 0, 0x8000, 16, 4, 0);
            descriptor(pgm, 0x8000, 0, 0x9000, 16, 4, 0);
        }),
        ("more chains than descriptors", |pgm| {
            pgm.write(GuestPhys(AVAILABLE + 2), &(SIZE + 1).to_le_bytes());
        }),
    ];
    for (what, damage) in damages {
        let (pgm, mut queue) = (memory(), queue());
        offer(&pgm, 0, 0);
        damage(&pgm);
        assert!(queue.pop(&pgm).is_none(), "{what}");
        assert!(queue.is_broken(), "{what}");
        assert!(queue.pop(&pgm).is_none(), "{what}");
    }
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let (pgm, mut queue) = (memory(), queue());
    // By flag.
    pgm.write(GuestPhys(AVAILABLE), &1u16.to_le_bytes());
    queue.push(&pgm, 0, 0);
    assert!(!queue.publish(&pgm));
    // By index: at the third one.
    queue.event_index = true;
    pgm.write(GuestPhys(AVAILABLE + 4 + 2 * u64::from(SIZE)), &2u16.to_le_bytes());
    queue.push(&pgm, 0, 0);
    assert!(!queue.publish(&pgm));
    queue.push(&pgm, 0, 0);
    assert!(queue.publish(&pgm));
}

/// Gives every chain of its one queue back at once.
struct Echo {
    resets: u32,
}

impl VirtioDevice for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }
    fn id(&self) -> u16 {
        1
    }
    fn class(&self) -> [u8; 3] {
        [2, 0, 0]
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queues(&self) -> &'static [u16] {
        &[SIZE]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4]
    }
    fn config_written(&mut self, _offset: usize, _data: &[u8]) {}
    fn activate(&mut self, _transport: &mut Transport) {}
    fn notified(&mut self, queue: usize, transport: &mut Transport) {
        while let Some(chain) = transport.queue(queue).and_then(|(q, memory)| q.pop(memory)) {
            if let Some((q, memory)) = transport.queue(queue) {
                q.push(memory, chain.head, 0);
            }
        }
        transport.publish(queue);
    }
    fn reset(&mut self, _transport: &mut Transport) {
        self.resets += 1;
    }
    fn save(&self, _out: &mut Writer) {}
    fn load(&mut self, _input: &mut Reader<'_>) -> Result<(), Error> {
        Ok(())
    }
}

#[derive(Default)]
struct Line(AtomicBool);

impl IrqSink for Line {
    fn set_level(&self, _pin: u32, level: bool) {
        self.0.store(level, Ordering::SeqCst);
    }
}

fn echo() -> (Arc<Mutex<VirtioPci<Echo>>>, Arc<Pgm>, Arc<Line>) {
    let (pgm, line) = (memory(), Arc::new(Line::default()));
    let irq: IrqLine = IrqPin::new(line.clone(), 0).line();
    (VirtioPci::new(Echo { resets: 0 }, Wiring { pgm: pgm.clone(), irq }), pgm, line)
}

#[test]
fn a_driver_of_version_1_sets_the_device_up() {
    let (device, pgm, line) = echo();
    let mut d = device.lock();
    let write = |d: &mut VirtioPci<Echo>, at: u64, bytes: &[u8]| d.mmio_write(0, at, bytes);
    let read = |d: &mut VirtioPci<Echo>, at: u64, len: usize| {
        let mut bytes = [0; 8];
        d.mmio_read(0, at, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    };
    write(&mut d, 20, &[1]);
    write(&mut d, 20, &[3]);
    write(&mut d, 0, &1u32.to_le_bytes());
    assert_eq!(read(&mut d, 4, 4), 1);
    // Without VERSION_1 the features are not accepted.
    write(&mut d, 20, &[11]);
    assert_eq!(read(&mut d, 20, 1), 3);
    write(&mut d, 8, &1u32.to_le_bytes());
    write(&mut d, 12, &1u32.to_le_bytes());
    write(&mut d, 8, &0u32.to_le_bytes());
    write(&mut d, 12, &(1u32 << 5).to_le_bytes());
    write(&mut d, 20, &[11]);
    assert_eq!(read(&mut d, 20, 1), 11);
    assert_eq!((read(&mut d, 18, 2), read(&mut d, 24, 2)), (1, SIZE.into()));
    write(&mut d, 32, &TABLE.to_le_bytes());
    write(&mut d, 40, &(AVAILABLE as u32).to_le_bytes());
    write(&mut d, 44, &0u32.to_le_bytes());
    write(&mut d, 48, &USED.to_le_bytes());
    write(&mut d, 28, &[1, 0]);
    write(&mut d, 20, &[15]);
    descriptor(&pgm, TABLE, 0, 0x8000, 1, 0, 0);
    offer(&pgm, 0, 0);
    write(&mut d, 0x3000, &[0, 0]);
    assert!(line.0.load(Ordering::SeqCst));
    assert_eq!(read(&mut d, 0x1000, 1), 1);
    assert!(!line.0.load(Ordering::SeqCst));
    assert_eq!(read(&mut d, 0x2001, 2), 0x0302);
    // A chain that makes no sense stops the device and tells the driver.
    offer(&pgm, 1, 99);
    write(&mut d, 0x3000, &[0, 0]);
    assert_eq!(read(&mut d, 20, 1), 0x4f);
    assert_eq!(read(&mut d, 0x1000, 1), 2);
    write(&mut d, 20, &[0]);
    assert_eq!((read(&mut d, 20, 1), d.device.resets), (0, 1));
}

#[test]
fn a_legacy_driver_sets_the_device_up() {
    let (device, pgm, line) = echo();
    let mut d = device.lock();
    d.port_write(Port(0xd012), Width::Byte, 1);
    d.port_write(Port(0xd012), Width::Byte, 3);
    assert_ne!(d.port_read(Port(0xd000), Width::Dword) & (1 << 5), 0);
    d.port_write(Port(0xd004), Width::Dword, 1 << 5);
    d.port_write(Port(0xd00e), Width::Word, 0);
    assert_eq!(d.port_read(Port(0xd00c), Width::Word), SIZE.into());
    d.port_write(Port(0xd008), Width::Dword, 4);
    assert_eq!(d.port_read(Port(0xd008), Width::Dword), 4);
    d.port_write(Port(0xd012), Width::Byte, 7);
    // Table, available ring, and the used ring on the next page.
    descriptor(&pgm, 0x4000, 0, 0x8000, 1, 0, 0);
    pgm.write(GuestPhys(0x4000 + 128 + 2), &1u16.to_le_bytes());
    d.port_write(Port(0xd010), Width::Word, 0);
    let mut used = [0; 2];
    pgm.read(GuestPhys(0x5002), &mut used);
    assert_eq!(used, [1, 0]);
    assert!(line.0.load(Ordering::SeqCst));
    assert_eq!(d.port_read(Port(0xd013), Width::Byte), 1);
    assert_eq!(d.port_read(Port(0xd014), Width::Dword), 0x0403_0201);
}

/// Remembers doorbells, and rings them.
#[derive(Default)]
struct Ear(Mutex<Vec<Doorbell>>);

impl Watcher for Ear {
    fn put_up(&self, _: BellId, doorbell: &Doorbell) {
        self.0.lock().push(doorbell.clone());
    }
    fn take_down(&self, _: BellId) {}
}

#[test]
fn either_doorbell_has_the_device_look_at_its_queue_and_one_rung_before_a_reset_does_nothing_after_it() {
    let (device, pgm, _) = echo();
    let iom = Iom::new();
    let bus = PciBus::new(iom.clone(), pgm.clone());
    let at = DevFn::new(3, 0);
    VirtioPci::register(&device, &bus, at);
    let ear = Arc::new(Ear::default());
    let watcher: Arc<dyn Watcher> = ear.clone();
    iom.doorbells().watch(&watcher);
    bus.config_write(at, 0x10, Width::Dword, 0xd000);
    bus.config_write(at, 0x20, Width::Dword, 0xe000_0000);
    bus.config_write(at, 0x04, Width::Word, 3);
    let bells = ear.0.lock().clone();
    let places: Vec<_> = bells.iter().map(|bell| bell.place).collect();
    assert_eq!(places, [Place::Port(Port(0xd010), 0), Place::Memory(GuestPhys(0xe000_3000))]);
    // A legacy driver's queue.
    iom.write(Port(0xd008), Width::Dword, 4);
    iom.write(Port(0xd012), Width::Byte, 7);
    descriptor(&pgm, 0x4000, 0, 0x8000, 1, 0, 0);
    let used = || {
        let mut index = [0; 2];
        pgm.read(GuestPhys(0x5002), &mut index);
        u16::from_le_bytes(index)
    };
    for (bell, index) in bells.iter().zip(1u16..) {
        pgm.write(GuestPhys(0x4000 + 128 + 2), &index.to_le_bytes());
        assert_eq!(used(), index - 1);
        bell.device.upgrade().unwrap().rung(bell.number);
        assert_eq!(used(), index);
    }
    pgm.write(GuestPhys(0x4000 + 128 + 2), &3u16.to_le_bytes());
    iom.write(Port(0xd012), Width::Byte, 0);
    bells[0].device.upgrade().unwrap().rung(0);
    assert_eq!(used(), 2);
}

#[test]
fn saved_states_are_equal_after_the_way_there_and_back() {
    let (device, _, _) = echo();
    let save = |d: &VirtioPci<Echo>| {
        let mut out = Writer::new();
        d.save(&mut out);
        out.into_bytes()
    };
    let before = {
        let mut d = device.lock();
        d.port_write(Port(0xd012), Width::Byte, 3);
        d.port_write(Port(0xd008), Width::Dword, 4);
        save(&d)
    };
    let (other, _, _) = echo();
    other.lock().load(Reader::new("echo", 1, &before)).unwrap();
    assert_eq!(save(&other.lock()), before);
    for len in 0..before.len() {
        assert!(other.lock().load(Reader::new("echo", 1, &before[..len])).is_err(), "{len}");
        assert_eq!(save(&other.lock()), before);
    }
    Device::reset(&mut *other.lock());
    assert_ne!(save(&other.lock()), before);
}

#[derive(Default)]
struct Sent(Mutex<Vec<u32>>);

impl MsiSink for Sent {
    fn send(&self, _address: u64, data: u32) {
        self.0.lock().push(data);
    }
}

/// Plugs the device in and switches MSI-X on, with vector N sending N.
fn with_msix(device: &Arc<Mutex<VirtioPci<Echo>>>, pgm: &Arc<Pgm>) -> Arc<Sent> {
    let (bus, sent) = (PciBus::new(Iom::new(), pgm.clone()), Arc::new(Sent::default()));
    bus.connect_msi(sent.clone());
    let at = DevFn::new(3, 0);
    VirtioPci::register(device, &bus, at);
    let msix = device.lock().transport.msix.clone();
    for vector in 0..2u32 {
        for (i, value) in [0xfee0_0000, 0, vector, 0].into_iter().enumerate() {
            msix.mmio_write(VcpuId(0), u64::from(16 * vector) + 4 * i as u64, &u32::to_le_bytes(value));
        }
    }
    assert_eq!(bus.config_read(at, 0x98, Width::Byte), 0x11);
    bus.config_write(at, 0x9a, Width::Word, 0x8000);
    sent
}

#[test]
fn a_driver_with_msix_gets_messages_and_no_line() {
    let (device, pgm, line) = echo();
    let sent = with_msix(&device, &pgm);
    let mut d = device.lock();
    d.mmio_write(0, 20, &[3]);
    d.mmio_write(0, 8, &1u32.to_le_bytes());
    d.mmio_write(0, 12, &1u32.to_le_bytes());
    d.mmio_write(0, 20, &[11]);
    let vector = |d: &mut VirtioPci<Echo>, at: u64, wanted: u16| {
        d.mmio_write(0, at, &wanted.to_le_bytes());
        let mut bytes = [0; 2];
        d.mmio_read(0, at, &mut bytes);
        u16::from_le_bytes(bytes)
    };
    assert_eq!(vector(&mut d, 16, 2), 0xffff, "there are two vectors");
    assert_eq!((vector(&mut d, 16, 0), vector(&mut d, 26, 1)), (0, 1));
    for (at, value) in [(32, TABLE), (40, AVAILABLE), (48, USED)] {
        d.mmio_write(0, at, &value.to_le_bytes());
    }
    d.mmio_write(0, 28, &[1, 0]);
    d.mmio_write(0, 20, &[15]);
    descriptor(&pgm, TABLE, 0, 0x8000, 1, 0, 0);
    offer(&pgm, 0, 0);
    d.mmio_write(0, 0x3000, &[0, 0]);
    d.transport.config_changed();
    assert_eq!(*sent.0.lock(), [1, 0]);
    assert!(!line.0.load(Ordering::SeqCst));
    Device::reset(&mut *d);
    d.mmio_write(0, 20, &[0]);
    assert_eq!(vector(&mut d, 26, 9), 0xffff);
}

#[test]
fn legacy_drivers_with_msix_find_two_more_registers_before_the_configuration() {
    let (device, pgm, _) = echo();
    let mut d = device.lock();
    assert_eq!(d.port_read(Port(0xd014), Width::Dword), 0x0403_0201);
    drop(d);
    let _sent = with_msix(&device, &pgm);
    d = device.lock();
    d.port_write(Port(0xd014), Width::Word, 0);
    d.port_write(Port(0xd016), Width::Word, 5);
    assert_eq!(d.port_read(Port(0xd014), Width::Word), 0);
    assert_eq!(d.port_read(Port(0xd016), Width::Word), 0xffff);
    assert_eq!(d.port_read(Port(0xd018), Width::Dword), 0x0403_0201);
}

/// What iPXE looks for before it takes a card: without one of the capabilities it takes none.
#[test]
fn every_register_block_has_a_capability_that_lies_in_its_bar() {
    let (device, pgm, _) = echo();
    let bus = PciBus::new(Iom::new(), pgm);
    let at = DevFn::new(3, 0);
    VirtioPci::register(&device, &bus, at);
    let byte = |offset: u32| bus.config_read(at, offset as u8, Width::Byte);
    let dword = |offset: u32| bus.config_read(at, offset as u8, Width::Dword);
    bus.config_write(at, 0x20, Width::Dword, !0);
    let size = !(dword(0x20) & !0xf) + 1;
    let (mut kinds, mut ends) = (Vec::new(), Vec::new());
    let mut next = byte(0x34);
    while next != 0 {
        if byte(next) == 0x09 {
            kinds.push(byte(next + 3));
            ends.push((next, next + byte(next + 2)));
            assert!(byte(next + 4) <= 5, "reserved BAR");
            if byte(next + 3) != 5 {
                assert_eq!((byte(next + 4), dword(next + 8) % 4), (4, 0));
                assert!(dword(next + 12) >= 4 && dword(next + 8) + dword(next + 12) <= size);
            }
        } else {
            ends.push((next, next + 12));
        }
        next = byte(next + 1);
    }
    kinds.sort();
    assert_eq!(kinds, [1, 2, 3, 4, 5], "common, notifications, interrupts, device, window");
    ends.sort();
    assert!(ends.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ends:x?}");
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let (device, pgm, line) = echo();
    let bus = PciBus::new(Iom::new(), pgm.clone());
    let at = DevFn::new(3, 0);
    VirtioPci::register(&device, &bus, at);
    let turn = |bar: u32, offset: u32, len: u32| {
        bus.config_write(at, 0x88, Width::Byte, bar);
        bus.config_write(at, 0x90, Width::Dword, len);
        bus.config_write(at, 0x8c, Width::Dword, offset);
    };
    let widths = [Width::Byte, Width::Byte, Width::Word, Width::Dword, Width::Dword];
    let write = |offset: u32, len: u32, value: u32| {
        turn(4, offset, len);
        bus.config_write(at, 0x94, widths[len as usize], value);
    };
    let read = |offset: u32, len: u32| {
        turn(4, offset, len);
        bus.config_read(at, 0x94, widths[len as usize])
    };
    write(20, 1, 3);
    write(8, 4, 1);
    write(12, 4, 1);
    write(20, 1, 11);
    assert_eq!((read(20, 1), read(18, 2), read(24, 2)), (11, 1, SIZE.into()));
    for (register, address) in [(32, TABLE), (40, AVAILABLE), (48, USED)] {
        write(register, 4, address as u32);
        write(register + 4, 4, 0);
    }
    write(28, 2, 1);
    write(20, 1, 15);
    descriptor(&pgm, TABLE, 0, 0x8000, 1, 0, 0);
    offer(&pgm, 0, 0);
    write(0x3000, 2, 0);
    assert!(line.0.load(Ordering::SeqCst));
    assert_eq!(read(0x2000, 4), 0x0403_0201);
    // Reading the interrupt status clears it; reading other registers beside the data does not.
    turn(4, 0x1000, 1);
    bus.config_read(at, 0x90, Width::Dword);
    bus.config_read(at, 0x98, Width::Byte);
    assert!(line.0.load(Ordering::SeqCst));
    assert_eq!(bus.config_read(at, 0x94, Width::Byte), 1);
    assert!(!line.0.load(Ordering::SeqCst));
    // Windows that do not exist change nothing.
    for (bar, offset, len) in [(0, 20, 1), (4, 21, 2), (4, 20, 3), (4, 20, 0), (4, 0x4014, 1), (4, !0, 1)] {
        turn(bar, offset, len);
        bus.config_write(at, 0x94, Width::Dword, 0);
        assert!(device.lock().transport.is_active(), "{bar} {offset:x} {len}");
    }
    write(20, 1, 0);
    assert_eq!((read(20, 1), device.lock().device.resets), (0, 1));
}
