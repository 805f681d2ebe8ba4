//! The pair of Intel 8237A DMA controllers of the IBM AT, with the page registers.
//!
//! Sources: Intel 8237A datasheet (231466-005); 82371SB (PIIX3) datasheet section 2.5.1. Channels 0–3 move bytes (ports
//! 0x00–0x0f), channels 4–7 words (0xc0–0xdf, even ports); channel 4 is the cascade. Page registers at 0x80–0x8f.
//!
//! A transfer runs when the device offers it, as many bytes as the channel takes; single, block and demand mode do not
//! differ then. Left out: memory-to-memory transfers (not wired on a PC), and software requests have no device to serve.

use std::sync::{Arc, Weak};

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::dma::{DmaOutcome, IsaDma};
use pdm::{Device, Iom, PortIo, Width};
use pgm::Pgm;
use vbox_types::{GuestPhys, Port};

/// The mode register of a channel.
#[bitfield(u8)]
struct Mode {
    #[bits(2)]
    channel: u8,
    /// 0 verify, 1 device to memory, 2 memory to device.
    #[bits(2)]
    transfer: u8,
    auto_initialize: bool,
    decrement: bool,
    /// 0 demand, 1 single, 2 block, 3 cascade.
    #[bits(2)]
    kind: u8,
}

const VERIFY: u8 = 0;
const TO_MEMORY: u8 = 1;
const FROM_MEMORY: u8 = 2;
const CASCADE: u8 = 3;

/// Command register bit: the controller is disabled.
const DISABLED: u8 = 1 << 2;

#[derive(Clone, Debug, Default)]
struct Channel {
    base_address: u16,
    base_count: u16,
    address: u16,
    count: u16,
    mode: Mode,
}

#[derive(Clone, Debug)]
struct Controller {
    channels: [Channel; 4],
    command: u8,
    /// Terminal counts reached since the status was read, bits 0–3.
    terminal: u8,
    /// Software requests, bits 0–3.
    requests: u8,
    mask: u8,
    /// The next byte is the high one.
    high: bool,
    temporary: u8,
}

impl Controller {
    fn power_on() -> Self {
        Self {
            channels: std::array::from_fn(|_| Channel::default()),
            command: 0,
            terminal: 0,
            requests: 0,
            mask: 0x0f,
            high: false,
            temporary: 0,
        }
    }

    fn master_clear(&mut self) {
        self.command = 0;
        self.terminal = 0;
        self.requests = 0;
        self.mask = 0x0f;
        self.high = false;
        self.temporary = 0;
    }

    fn read(&mut self, register: u8) -> u8 {
        match register {
            0..=7 => {
                let channel = &self.channels[usize::from(register >> 1)];
                let value = if register & 1 == 0 { channel.address } else { channel.count };
                self.high = !self.high;
                value.to_le_bytes()[usize::from(!self.high)]
            }
            8 => std::mem::take(&mut self.terminal) | self.requests << 4,
            0xd => self.temporary,
            // All mask bits, as the PIIX lets them be read.
            0xf => self.mask | 0xf0,
            _ => 0xff,
        }
    }

    fn write(&mut self, register: u8, value: u8) {
        match register {
            0..=7 => {
                let channel = &mut self.channels[usize::from(register >> 1)];
                let (base, current) = if register & 1 == 0 {
                    (&mut channel.base_address, &mut channel.address)
                } else {
                    (&mut channel.base_count, &mut channel.count)
                };
                let mut bytes = base.to_le_bytes();
                bytes[usize::from(self.high)] = value;
                *base = u16::from_le_bytes(bytes);
                *current = *base;
                self.high = !self.high;
            }
            8 => self.command = value,
            9 => {
                let bit = 1 << (value & 3);
                self.requests = if value & 4 != 0 { self.requests | bit } else { self.requests & !bit };
            }
            0xa => {
                let bit = 1 << (value & 3);
                self.mask = if value & 4 != 0 { self.mask | bit } else { self.mask & !bit };
            }
            0xb => {
                let mode = Mode::from_bits(value);
                self.channels[usize::from(mode.channel())].mode = mode;
            }
            0xc => self.high = false,
            0xd => self.master_clear(),
            0xe => self.mask = 0,
            _ => self.mask = value & 0x0f,
        }
    }

    fn save(&self, out: &mut ssm::Writer) {
        let Self { channels, command, terminal, requests, mask, high, temporary } = self;
        for Channel { base_address, base_count, address, count, mode } in channels {
            for word in [base_address, base_count, address, count] {
                out.put_u16(*word);
            }
            out.put_u8(mode.into_bits());
        }
        out.put_bytes(&[*command, *terminal, *requests, *mask, *temporary]);
        out.put_bool(*high);
    }

    fn load(input: &mut ssm::Reader<'_>) -> Result<Self, ssm::Error> {
        let mut channels: [Channel; 4] = std::array::from_fn(|_| Channel::default());
        for channel in &mut channels {
            *channel = Channel {
                base_address: input.take_u16()?,
                base_count: input.take_u16()?,
                address: input.take_u16()?,
                count: input.take_u16()?,
                mode: Mode::from_bits(input.take_u8()?),
            };
        }
        let [command, terminal, requests, mask, temporary] =
            [input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?];
        if terminal > 0xf || requests > 0xf || mask > 0xf {
            return Err(input.invalid(format!("status {terminal:#x}, {requests:#x}, mask {mask:#x}")));
        }
        Ok(Self { channels, command, terminal, requests, mask, high: input.take_bool()?, temporary })
    }
}

/// A stretch of guest memory that part of a transfer touches, in ascending or descending order of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unit {
    address: GuestPhys,
    len: usize,
}

/// Guest-visible state of the pair.
#[derive(Clone, Debug)]
pub struct State {
    controllers: [Controller; 2],
    /// Ports 0x80–0x8f, most of which are plain storage.
    pages: [u8; 16],
}

/// Where in the page registers a channel's page is.
const PAGE_OF: [usize; 8] = [0x7, 0x3, 0x1, 0x2, 0xf, 0xb, 0x9, 0xa];

impl State {
    pub fn power_on() -> Self {
        Self { controllers: [Controller::power_on(), Controller::power_on()], pages: [0; 16] }
    }

    /// Runs up to `len` bytes of a transfer in `direction` on `channel`. `each` is called for every byte or word with its
    /// address and its offset from the transfer's start, `None` for a verify.
    fn transfer(
        &mut self,
        channel: u8,
        direction: u8,
        len: usize,
        mut each: impl FnMut(Unit, usize),
    ) -> DmaOutcome {
        let nothing = DmaOutcome { bytes: 0, terminal_count: false };
        let wide = channel >= 4;
        let Some(controller) = self.controllers.get_mut(usize::from(channel / 4)) else { return nothing };
        let index = usize::from(channel & 3);
        let bit = 1 << index;
        let state = &mut controller.channels[index];
        let mode = state.mode;
        let verify = mode.transfer() == VERIFY;
        if controller.command & DISABLED != 0
            || controller.mask & bit != 0
            || mode.kind() == CASCADE
            || !(verify || mode.transfer() == direction)
        {
            return nothing;
        }
        let page = u64::from(self.pages[PAGE_OF[usize::from(channel)]]);
        let size = if wide { 2 } else { 1 };
        // A word channel's page has its lowest bit unused, and its address counts words.
        let base = if wide { (page & 0xfe) << 16 } else { page << 16 };
        // The longest run between wraps of the 16-bit address, so that memory is touched in pieces.
        let mut done = 0;
        while done + size <= len {
            let run = if mode.decrement() {
                1
            } else {
                let to_wrap = 0x1_0000 - usize::from(state.address);
                let to_end = usize::from(state.count) + 1;
                to_wrap.min(to_end).min((len - done) / size)
            };
            if !verify {
                let address = GuestPhys(base + u64::from(state.address) * size as u64);
                each(Unit { address, len: run * size }, done);
            }
            done += run * size;
            // A run is at most 65536 long, and one of that length brings the address back to where it was.
            let step = run as u16;
            state.address = if mode.decrement() {
                state.address.wrapping_sub(step)
            } else {
                state.address.wrapping_add(step)
            };
            let (left, ended) = state.count.overflowing_sub(step);
            state.count = left;
            if ended || run == 0x1_0000 {
                controller.terminal |= bit;
                controller.requests &= !bit;
                if mode.auto_initialize() {
                    state.address = state.base_address;
                    state.count = state.base_count;
                } else {
                    controller.mask |= bit;
                }
                return DmaOutcome { bytes: done, terminal_count: true };
            }
        }
        DmaOutcome { bytes: done, terminal_count: false }
    }

    /// Reads a port.
    pub fn read(&mut self, port: Port) -> u8 {
        match port.0 {
            0x00..=0x0f => self.controllers[0].read(port.0 as u8),
            0xc0..=0xdf => self.controllers[1].read((port.0 as u8 & 0x1f) >> 1),
            0x80..=0x8f => self.pages[usize::from(port.0 & 0xf)],
            _ => 0xff,
        }
    }

    /// Writes a port.
    pub fn write(&mut self, port: Port, value: u8) {
        match port.0 {
            0x00..=0x0f => self.controllers[0].write(port.0 as u8, value),
            0xc0..=0xdf => self.controllers[1].write((port.0 as u8 & 0x1f) >> 1, value),
            0x80..=0x8f => self.pages[usize::from(port.0 & 0xf)] = value,
            _ => {}
        }
    }
}

/// The pair as a device.
pub struct Dma {
    pgm: Arc<Pgm>,
    state: State,
    /// Bytes moved so far.
    moved: u64,
}

impl Dma {
    /// A pair that moves data in `pgm`.
    pub fn new(pgm: Arc<Pgm>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { pgm, state: State::power_on(), moved: 0 }))
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        for (first, count) in [(0x00, 0x10), (0x80, 0x10), (0xc0, 0x20)] {
            iom.register(Port(first), count, Width::Byte, this.clone());
        }
    }

    /// The channels as devices see them.
    pub fn channels(this: &Arc<Mutex<Self>>) -> Arc<dyn IsaDma> {
        Arc::new(Channels(Arc::downgrade(this)))
    }
}

struct Channels(Weak<Mutex<Dma>>);

impl Channels {
    fn run(&self, transfer: impl FnOnce(&mut State, &Pgm) -> DmaOutcome) -> DmaOutcome {
        let Some(dma) = self.0.upgrade() else { return DmaOutcome { bytes: 0, terminal_count: false } };
        let mut dma = dma.lock();
        let Dma { pgm, state, moved } = &mut *dma;
        let outcome = transfer(state, pgm);
        *moved += outcome.bytes as u64;
        outcome
    }
}

impl IsaDma for Channels {
    fn write_memory(&self, channel: u8, data: &[u8]) -> DmaOutcome {
        self.run(|state, pgm| {
            state.transfer(channel, TO_MEMORY, data.len(), |unit, at| {
                pgm.write(unit.address, &data[at..at + unit.len]);
            })
        })
    }

    fn read_memory(&self, channel: u8, data: &mut [u8]) -> DmaOutcome {
        self.run(|state, pgm| {
            state.transfer(channel, FROM_MEMORY, data.len(), |unit, at| {
                pgm.read(unit.address, &mut data[at..at + unit.len]);
            })
        })
    }
}

impl PortIo for Dma {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        self.state.read(port).into()
    }

    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        self.state.write(port, value as u8);
    }
}

impl Device for Dma {
    fn reset(&mut self) {
        self.state = State::power_on();
        self.moved = 0;
    }
}

impl ssm::Saveable for Dma {
    fn unit_name(&self) -> &'static str {
        "i8237"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State { controllers, pages } = &self.state;
        controllers.iter().for_each(|controller| controller.save(out));
        out.put_bytes(pages);
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let controllers = [Controller::load(&mut input)?, Controller::load(&mut input)?];
        let mut pages = [0; 16];
        input.take_into(&mut pages)?;
        input.finish()?;
        self.state = State { controllers, pages };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgm::{Backing, HostMemory, Layer};
    use vbox_types::ByteSize;

    struct Bench {
        pgm: Arc<Pgm>,
        iom: Arc<Iom>,
        device: Arc<Mutex<Dma>>,
        channels: Arc<dyn IsaDma>,
    }

    impl Bench {
        fn new() -> Self {
            let pgm = Pgm::new(vec![]);
            let memory = Arc::new(HostMemory::new("test", ByteSize(1 << 20)).unwrap());
            pgm.map(GuestPhys(0), 1 << 20, Layer::Ram, Backing::ram(memory, 0));
            let (iom, device) = (Iom::new(), Dma::new(pgm.clone()));
            Dma::register(&device, &iom);
            let channels = Dma::channels(&device);
            Self { pgm, iom, device, channels }
        }

        fn out(&self, port: u16, value: u8) {
            self.iom.write(Port(port), Width::Byte, value.into());
        }

        fn inb(&self, port: u16) -> u8 {
            self.iom.read(Port(port), Width::Byte) as u8
        }

        /// Sets channel 2 up as a floppy driver does.
        fn floppy(&self, mode: u8, address: u32, count: u16) {
            self.out(0x0a, 0x06);
            self.out(0x0c, 0);
            self.out(0x04, address as u8);
            self.out(0x04, (address >> 8) as u8);
            self.out(0x81, (address >> 16) as u8);
            self.out(0x0c, 0);
            self.out(0x05, count as u8);
            self.out(0x05, (count >> 8) as u8);
            self.out(0x0b, mode | 2);
            self.out(0x0a, 0x02);
        }

        fn memory(&self, at: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.pgm.read(GuestPhys(at), &mut bytes);
            bytes
        }
    }

    #[test]
    fn a_floppy_read_ends_at_terminal_count_and_masks_the_channel() {
        let b = Bench::new();
        b.floppy(0x44, 0x2_1000, 511);
        let sector: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let first = b.channels.write_memory(2, &sector[..100]);
        assert_eq!(first, DmaOutcome { bytes: 100, terminal_count: false });
        let rest = b.channels.write_memory(2, &[&sector[100..], &[9; 50]].concat());
        assert_eq!(rest, DmaOutcome { bytes: 412, terminal_count: true });
        assert_eq!(b.memory(0x2_1000, 512), sector);
        assert_eq!([b.inb(8), b.inb(8)], [0x04, 0x00]);
        assert_eq!(b.channels.write_memory(2, &[1]).bytes, 0);
        assert_eq!([b.inb(5), b.inb(5)], [0xff, 0xff]);
    }

    #[test]
    fn auto_initialization_starts_over() {
        let b = Bench::new();
        b.floppy(0x58, 0x3_0000, 3);
        b.pgm.write(GuestPhys(0x3_0000), b"abcd");
        let mut out = [0; 4];
        for _ in 0..2 {
            assert!(b.channels.read_memory(2, &mut out).terminal_count);
            assert_eq!(&out, b"abcd");
        }
    }

    #[test]
    fn addresses_wrap_inside_their_page() {
        let b = Bench::new();
        b.floppy(0x44, 0x2_fffe, 3);
        b.channels.write_memory(2, b"wxyz");
        assert_eq!(b.memory(0x2_fffe, 2), b"wx");
        assert_eq!(b.memory(0x2_0000, 2), b"yz");
        assert_eq!(b.memory(0x3_0000, 2), [0, 0]);
    }

    #[test]
    fn a_decrementing_channel_goes_down() {
        let b = Bench::new();
        b.floppy(0x64, 0x2_0003, 3);
        b.channels.write_memory(2, b"abcd");
        assert_eq!(b.memory(0x2_0000, 4), b"dcba");
    }

    #[test]
    fn verify_counts_and_moves_nothing() {
        let b = Bench::new();
        b.floppy(0x40, 0x2_0000, 3);
        assert_eq!(b.channels.write_memory(2, b"abcd"), DmaOutcome { bytes: 4, terminal_count: true });
        assert_eq!(b.memory(0x2_0000, 4), [0; 4]);
    }

    #[test]
    fn channel_5_moves_words_in_128_kilobyte_pages() {
        let b = Bench::new();
        b.out(0xd8, 0);
        b.out(0xc4, 0x00);
        b.out(0xc4, 0x80);
        b.out(0x8b, 0x03);
        b.out(0xc6, 1);
        b.out(0xc6, 0);
        b.out(0xd6, 0x45);
        b.out(0xd4, 0x01);
        assert!(b.channels.write_memory(5, b"abcd").terminal_count);
        assert_eq!(b.memory(0x3_0000, 4), b"abcd");
    }

    #[test]
    fn a_count_of_64_kilobytes_moves_them_all() {
        let b = Bench::new();
        b.floppy(0x44, 0x2_0000, 0xffff);
        let outcome = b.channels.write_memory(2, &vec![7; 0x1_0001]);
        assert_eq!(outcome, DmaOutcome { bytes: 0x1_0000, terminal_count: true });
    }

    #[test]
    fn disabled_masked_or_misdirected_channels_move_nothing() {
        let b = Bench::new();
        b.floppy(0x44, 0x2_0000, 3);
        assert_eq!(b.channels.read_memory(2, &mut [0; 4]).bytes, 0);
        b.out(0x08, 0x04);
        assert_eq!(b.channels.write_memory(2, &[0; 4]).bytes, 0);
        b.out(0x0d, 0);
        assert_eq!(b.channels.write_memory(2, &[0; 4]).bytes, 0);
        assert_eq!(b.channels.write_memory(9, &[0; 4]).bytes, 0);
    }

    #[test]
    fn the_saved_state_comes_back_byte_for_byte() {
        let b = Bench::new();
        b.floppy(0x44, 0x2_1000, 511);
        b.channels.write_memory(2, &[1; 9]);
        b.out(0x04, 1);
        crate::testing::assert_saved_state_survives(&b.device, &Bench::new().device);
    }
}
