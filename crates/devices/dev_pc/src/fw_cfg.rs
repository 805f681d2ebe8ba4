//! The firmware configuration device (QEMU `docs/specs/fw_cfg.rst`): how SeaBIOS and OVMF learn what machine they run on.
//!
//! Ports: selector 0x510 (16 bits, write only), data 0x511 (bytes), DMA address 0x514 (high half) and 0x518 (low half, starts the
//! transfer), both big endian. Items are blobs under a 16-bit key; files are items from 0x20 on, listed in the directory under key 0x19.
//! Everything is read-only for the guest: a DMA write fails. VirtualBox has no such device; its own BIOS gets its facts elsewhere.
//!
//! Items are set while the machine is assembled ([`FwCfg::add_key`], [`FwCfg::add_file`]) and may be replaced while the machine is
//! stopped, at reset for example. They follow from the machine's configuration, so they are no part of a saved state.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use pdm::{Device, Iom, PortIo, Width};
use pgm::Pgm;
use ssm::{Error, Reader, Saveable, Writer};
use vbox_types::{ByteSize, GuestPhys, Port};

use crate::memory_map;

const SELECTOR: Port = Port(0x510);
const DATA: Port = Port(0x511);
const DMA_HIGH: Port = Port(0x514);
const DMA_LOW: Port = Port(0x518);

/// Well-known keys.
pub mod key {
    pub const SIGNATURE: u16 = 0x00;
    pub const ID: u16 = 0x01;
    pub const UUID: u16 = 0x02;
    pub const RAM_SIZE: u16 = 0x03;
    pub const NO_GRAPHIC: u16 = 0x04;
    pub const CPU_COUNT: u16 = 0x05;
    pub const BOOT_MENU: u16 = 0x0e;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const FILE_DIRECTORY: u16 = 0x19;
    /// First key that a file gets.
    pub const FILE_FIRST: u16 = 0x20;
    /// The timer's interrupt is I/O APIC input 2.
    pub const IRQ0_OVERRIDE: u16 = 0x8002;
}

/// Features told under [`key::ID`]: the data port and DMA.
const FEATURES: u32 = 0b11;
/// What reading the DMA address register gives.
const DMA_SIGNATURE: u64 = 0x5145_4d55_2043_4647; // "QEMU CFG"

/// Bits of a DMA control word.
mod dma {
    pub(super) const ERROR: u32 = 1 << 0;
    pub(super) const READ: u32 = 1 << 1;
    pub(super) const SKIP: u32 = 1 << 2;
    pub(super) const SELECT: u32 = 1 << 3;
    pub(super) const WRITE: u32 = 1 << 4;
}

/// A DMA read writes at most this many zeros behind an item's end, so that no guest can have gigabytes of them written at a stroke.
static ZEROS: [u8; 0x1_0000] = [0; 0x1_0000];

/// Longest file name with its terminating zero.
const NAME_SIZE: usize = 56;

struct File {
    name: String,
    content: Arc<[u8]>,
}

/// What the guest changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    selected: u16,
    /// Next byte of the selected item.
    offset: u32,
    dma_address: u64,
}

impl State {
    const RESET: Self = Self { selected: 0, offset: 0, dma_address: 0 };
}

/// The device.
pub struct FwCfg {
    pgm: Arc<Pgm>,
    keys: BTreeMap<u16, Arc<[u8]>>,
    /// In the order of their names; the key of number `i` is `FILE_FIRST + i`.
    files: Vec<File>,
    state: State,
}

impl FwCfg {
    pub fn new(pgm: &Arc<Pgm>) -> Arc<Mutex<Self>> {
        let mut device =
            Self { pgm: pgm.clone(), keys: BTreeMap::new(), files: Vec::new(), state: State::RESET };
        device.add_key(key::SIGNATURE, b"QEMU");
        device.add_key(key::ID, &FEATURES.to_le_bytes());
        device.update_directory();
        Arc::new(Mutex::new(device))
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        iom.register(SELECTOR, 1, Width::Word, this.clone());
        iom.register(DATA, 1, Width::Byte, this.clone());
        iom.register(DMA_HIGH, 8, Width::Dword, this.clone());
    }

    /// Sets the item under `key`.
    pub fn add_key(&mut self, key: u16, content: &[u8]) {
        self.keys.insert(key, content.into());
    }

    /// Adds a file, or replaces the content of the one with that name.
    ///
    /// # Panics
    /// If the name is longer than 55 bytes, which is a mistake in the machine's assembly.
    pub fn add_file(&mut self, name: &str, content: impl Into<Arc<[u8]>>) {
        assert!(name.len() < NAME_SIZE, "fw_cfg file name {name}");
        let file = File { name: name.to_owned(), content: content.into() };
        match self.files.binary_search_by(|f| f.name.as_str().cmp(name)) {
            Ok(at) => self.files[at] = file,
            Err(at) => self.files.insert(at, file),
        }
        self.update_directory();
    }

    /// Takes a file away, if it is there.
    pub fn remove_file(&mut self, name: &str) {
        self.files.retain(|f| f.name != name);
        self.update_directory();
    }

    /// What the firmware needs to know of CPUs and memory: the legacy keys and `etc/e820`.
    pub fn add_machine(&mut self, cpus: u16, ram: ByteSize) {
        let (low, high) = memory_map::split_ram(ram);
        self.add_key(key::RAM_SIZE, &low.to_le_bytes());
        self.add_key(key::NO_GRAPHIC, &0u16.to_le_bytes());
        self.add_key(key::CPU_COUNT, &cpus.to_le_bytes());
        self.add_key(key::MAX_CPUS, &cpus.to_le_bytes());
        self.add_key(key::IRQ0_OVERRIDE, &[1]);
        let mut map = Vec::new();
        const RAM: u32 = 1;
        for (start, len) in [(0, low), (memory_map::HIGH_RAM.0, high)] {
            if len > 0 {
                map.extend_from_slice(&u64::to_le_bytes(start));
                map.extend_from_slice(&len.to_le_bytes());
                map.extend_from_slice(&RAM.to_le_bytes());
            }
        }
        self.add_file("etc/e820", map);
    }

    /// How many CPUs the BIOS finds at its next start.
    pub fn set_cpu_count(&mut self, cpus: u16) {
        self.add_key(key::CPU_COUNT, &cpus.to_le_bytes());
    }

    /// Boot order and boot menu. `order` has the devices to try, the first first; `wait` is how long the menu's prompt is shown, in
    /// milliseconds. After the last device the BIOS stops, it does not fall back to devices outside the list.
    pub fn add_boot(&mut self, order: &[BootDevice], menu: bool, wait: u16) {
        let mut list: Vec<String> = order.iter().map(BootDevice::path).collect();
        list.push("HALT".to_owned());
        self.add_file("bootorder", (list.join("\n") + "\0").into_bytes());
        self.add_key(key::BOOT_MENU, &u16::from(menu).to_le_bytes());
        self.add_file("etc/show-boot-menu", u64::from(menu).to_le_bytes().to_vec());
        self.add_file("etc/boot-menu-wait", u64::from(wait).to_le_bytes().to_vec());
    }

    fn update_directory(&mut self) {
        let mut directory = Vec::with_capacity(4 + 64 * self.files.len());
        directory.extend_from_slice(&(self.files.len() as u32).to_be_bytes());
        for (file, key) in self.files.iter().zip(key::FILE_FIRST..) {
            directory.extend_from_slice(&(file.content.len() as u32).to_be_bytes());
            directory.extend_from_slice(&key.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            let mut name = [0; NAME_SIZE];
            name[..file.name.len()].copy_from_slice(file.name.as_bytes());
            directory.extend_from_slice(&name);
        }
        self.keys.insert(key::FILE_DIRECTORY, directory.into());
    }

    /// The selected item, from the present offset on; empty past its end and where there is no item.
    fn rest(&self) -> &[u8] {
        let selected = self.state.selected;
        let file = selected.checked_sub(key::FILE_FIRST).and_then(|i| self.files.get(usize::from(i)));
        let content = match (self.keys.get(&selected), file) {
            (Some(content), _) => content,
            (None, Some(file)) => &file.content,
            (None, None) => return &[],
        };
        content.get(self.state.offset as usize..).unwrap_or(&[])
    }

    fn select(&mut self, key: u16) {
        // Bit 14 once opened an item for writing.
        self.state.selected = key & !0x4000;
        self.state.offset = 0;
    }

    fn advance(&mut self, by: u32) {
        self.state.offset = self.state.offset.saturating_add(by);
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.rest().first().copied().unwrap_or(0);
        self.advance(1);
        byte
    }

    /// Carries out the transfer described at `dma_address`: control, length (32 bits each) and address (64 bits), big endian.
    fn transfer(&mut self) {
        let at = GuestPhys(std::mem::take(&mut self.state.dma_address));
        let mut words = [[0; 4]; 4];
        self.pgm.read(at, words.as_flattened_mut());
        let [control, length, high, low] = words.map(u32::from_be_bytes);
        let address = GuestPhys(u64::from(high) << 32 | u64::from(low));
        if control & dma::SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        let mut result = 0;
        if control & dma::READ != 0 {
            let rest = self.rest();
            let count = rest.len().min(length as usize);
            self.pgm.write(address, &rest[..count]);
            // Past the item's end there are zeros, of which nobody needs many.
            let zeros = (length as usize - count).min(ZEROS.len());
            self.pgm.write(address.wrapping_add(count as u64), &ZEROS[..zeros]);
            self.advance(length);
        } else if control & dma::WRITE != 0 {
            result = dma::ERROR;
        } else if control & dma::SKIP != 0 {
            self.advance(length);
        }
        self.pgm.write(at, &result.to_be_bytes());
    }
}

impl PortIo for FwCfg {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        match port {
            DATA => self.read_data().into(),
            SELECTOR => 0,
            _ => {
                let offset = port.0.wrapping_sub(DMA_HIGH.0);
                let bytes = DMA_SIGNATURE.to_be_bytes();
                let mut value = [0xff; 4];
                for (i, out) in value.iter_mut().enumerate().take(width.bytes().into()) {
                    *out = bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
                }
                u32::from_le_bytes(value)
            }
        }
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        match (port, width) {
            (SELECTOR, Width::Word | Width::Byte) => self.select(value as u16),
            (DMA_HIGH, Width::Dword) => {
                self.state.dma_address = u64::from(value.swap_bytes()) << 32;
            }
            (DMA_LOW, Width::Dword) => {
                self.state.dma_address |= u64::from(value.swap_bytes());
                self.transfer();
            }
            _ => {}
        }
    }

    fn port_read_string(&mut self, port: Port, width: Width, out: &mut [u8]) {
        if port == DATA && width == Width::Byte {
            let rest = self.rest();
            let count = rest.len().min(out.len());
            out[..count].copy_from_slice(&rest[..count]);
            out[count..].fill(0);
            self.advance(out.len() as u32);
        } else {
            for item in out.chunks_mut(width.bytes().into()) {
                let value = self.port_read(port, width).to_le_bytes();
                item.copy_from_slice(&value[..item.len()]);
            }
        }
    }
}

impl Saveable for FwCfg {
    fn unit_name(&self) -> &'static str {
        "fw_cfg"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut Writer) {
        let Self { pgm: _, keys: _, files: _, state: State { selected, offset, dma_address } } = self;
        out.put_u16(*selected);
        out.put_u32(*offset);
        out.put_u64(*dma_address);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        let state =
            State { selected: input.take_u16()?, offset: input.take_u32()?, dma_address: input.take_u64()? };
        input.finish()?;
        self.state = state;
        Ok(())
    }
}

impl Device for FwCfg {
    fn reset(&mut self) {
        self.state = State::RESET;
    }
}

/// A device that the BIOS can boot from, named as SeaBIOS matches it (`src/boot.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootDevice {
    /// Floppy drive A (0) or B (1).
    Floppy(u8),
    /// A disk or CD drive at the PIIX3 IDE controller: channel and device.
    Ide { channel: u8, device: u8 },
    /// A port of an AHCI controller in this slot.
    Ahci { slot: u8, port: u8 },
    /// A controller in this slot that has one disk to boot from: NVMe, virtio.
    Pci { slot: u8 },
    /// A target of a SCSI controller in this slot.
    Scsi { slot: u8, target: u8 },
    /// The boot ROM of a network adapter in this slot.
    Network { slot: u8 },
}

impl BootDevice {
    fn path(&self) -> String {
        match self {
            Self::Floppy(drive) => format!("/pci@i0cf8/isa@1/fdc@03f0/floppy@{drive:x}"),
            Self::Ide { channel, device } => format!("/pci@i0cf8/ide@1,1/drive@{channel:x}/disk@{device:x}"),
            Self::Ahci { slot, port } => format!("/pci@i0cf8/pci8086,2829@{slot:x}/drive@{port:x}/disk@0"),
            Self::Pci { slot } => format!("/pci@i0cf8/scsi@{slot:x}"),
            Self::Scsi { slot, target } => format!("/pci@i0cf8/scsi@{slot:x}/channel@0/disk@{target:x},0"),
            Self::Network { slot } => format!("/pci@i0cf8/ethernet@{slot:x}/ethernet-phy@0"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_golden, assert_saved_state_survives};
    use pgm::{Backing, HostMemory, Layer};

    struct Machine {
        iom: Arc<Iom>,
        pgm: Arc<Pgm>,
        device: Arc<Mutex<FwCfg>>,
    }

    fn machine() -> Machine {
        let (iom, pgm) = (Iom::new(), Pgm::new(vec![]));
        let ram = Arc::new(HostMemory::new("ram", ByteSize(0x4000)).unwrap());
        pgm.map(GuestPhys(0), ram.len(), Layer::Ram, Backing::ram(ram, 0));
        let device = FwCfg::new(&pgm);
        FwCfg::register(&device, &iom);
        Machine { iom, pgm, device }
    }

    impl Machine {
        fn select(&self, key: u16) {
            self.iom.write(SELECTOR, Width::Word, key.into());
        }

        fn bytes(&self, count: usize) -> Vec<u8> {
            (0..count).map(|_| self.iom.read(DATA, Width::Byte) as u8).collect()
        }

        fn dma(&self, control: u32, length: u32, address: u64) -> u32 {
            let mut request = [control, length, (address >> 32) as u32, address as u32].map(u32::to_be_bytes);
            self.pgm.write(GuestPhys(0x100), request.as_flattened());
            self.iom.write(DMA_HIGH, Width::Dword, 0);
            self.iom.write(DMA_LOW, Width::Dword, 0x100u32.swap_bytes());
            self.pgm.read(GuestPhys(0x100), request[0].as_mut_slice());
            u32::from_be_bytes(request[0])
        }

        fn memory(&self, at: u64, count: usize) -> Vec<u8> {
            let mut out = vec![0; count];
            self.pgm.read(GuestPhys(at), &mut out);
            out
        }
    }

    #[test]
    fn the_signature_and_the_features_are_told() {
        let m = machine();
        m.select(key::SIGNATURE);
        assert_eq!(m.bytes(5), b"QEMU\0");
        m.select(key::ID);
        assert_eq!(m.bytes(4), [3, 0, 0, 0]);
        m.select(0x1234);
        assert_eq!(m.bytes(2), [0, 0]);
        let both = [DMA_HIGH, DMA_LOW].map(|p| m.iom.read(p, Width::Dword).to_le_bytes());
        assert_eq!(both.as_flattened(), b"QEMU CFG");
    }

    #[test]
    fn the_directory_lists_files_by_name_and_leads_to_their_content() {
        let m = machine();
        m.device.lock().add_file("etc/b", vec![1, 2, 3]);
        m.device.lock().add_file("etc/a", vec![9]);
        m.device.lock().add_file("etc/b", vec![4, 5]);
        m.select(key::FILE_DIRECTORY);
        let directory = m.bytes(4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..18], *b"\0\0\0\x01\0\x20\0\0etc/a\0");
        assert_eq!(directory[68..82], *b"\0\0\0\x02\0\x21\0\0etc/b\0");
        m.select(0x21);
        let mut out = [0; 3];
        m.iom.read_string(DATA, Width::Byte, &mut out);
        assert_eq!(out, [4, 5, 0]);
    }

    #[test]
    fn dma_selects_skips_reads_and_pads_with_zeros() {
        let m = machine();
        m.device.lock().add_file("f", vec![1, 2, 3, 4]);
        m.pgm.write(GuestPhys(0x200), &[0xaa; 8]);
        assert_eq!(m.dma(0x20 << 16 | dma::SELECT | dma::SKIP, 1, 0), 0);
        assert_eq!(m.dma(dma::READ, 6, 0x200), 0);
        assert_eq!(m.memory(0x200, 8), [2, 3, 4, 0, 0, 0, 0xaa, 0xaa]);
        assert_eq!(m.dma(dma::WRITE, 1, 0x200), dma::ERROR);
    }

    #[test]
    fn memory_is_told_below_and_above_four_gib() {
        let m = machine();
        m.device.lock().add_machine(4, ByteSize::mib(4096));
        m.select(key::CPU_COUNT);
        assert_eq!(m.bytes(2), [4, 0]);
        m.select(key::FILE_FIRST);
        let map = m.bytes(41);
        assert_eq!(map[..20], *b"\0\0\0\0\0\0\0\0\0\0\0\xe0\0\0\0\0\x01\0\0\0");
        assert_eq!(map[20..], *b"\0\0\0\0\x01\0\0\0\0\0\0\x20\0\0\0\0\x01\0\0\0\0");
    }

    #[test]
    fn the_boot_order_is_named_as_seabios_matches_it() {
        let m = machine();
        let order = [BootDevice::Ide { channel: 1, device: 0 }, BootDevice::Floppy(0)];
        m.device.lock().add_boot(&order, true, 2500);
        m.select(key::FILE_FIRST);
        let text = String::from_utf8(m.bytes(90)).unwrap();
        let expected = "/pci@i0cf8/ide@1,1/drive@1/disk@0\n/pci@i0cf8/isa@1/fdc@03f0/floppy@0\nHALT\0";
        assert_eq!(text.trim_end_matches('\0'), expected.trim_end_matches('\0'));
        m.select(key::BOOT_MENU);
        assert_eq!(m.bytes(2), [1, 0]);
    }

    #[test]
    fn a_transfer_under_way_survives_saving() {
        let (one, other) = (machine(), machine());
        one.select(key::ID);
        one.bytes(1);
        assert_golden(&one.device, include_str!("golden/fw_cfg.v1.hex"));
        assert_saved_state_survives(&one.device, &other.device);
        assert_eq!(other.bytes(4), [0, 0, 0, 0]);
    }
}
