//! LsiLogic SCSI (LSI53C1030, 1000:0030) and LsiLogic SAS (SAS1068, 1000:0054), as VirtualBox has them: controllers of LSI's Fusion-MPT
//! family. Source: LSI Fusion-MPT Message Passing Interface Specification 1.2 and 1.5.
//!
//! The guest speaks to an I/O controller (IOC) by messages. At first through the doorbell, word by word; then by the addresses of
//! message frames in its memory, which it writes into the request queue. A command that went well ends as its context in the reply
//! queue; anything else is a reply frame in the guest's memory, one of those it has put into the same register. Registers are in
//! ports (BAR 0) and memory (BAR 1).
//!
//! **Left out.** Diagnostic memory (BAR 2 reads as zeros), firmware up- and download, target mode, integrated RAID, message-signalled
//! interrupts: the controller says so. Pages of configuration that would be empty are not there.
//!
//! **Other than in VirtualBox**, task management ends commands; replies for which the guest has no frame wait for one instead of
//! being a fault; SAS drives that come and go while the guest runs are told by events.
//!
//! **Saved state**: see [`crate::scsi`].

mod config;
mod saved;
mod spec;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{BlockError, Medium};
use pdm::iom::mmio_handler;
use pdm::irq::IrqLine;
use pdm::pci::{self, Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, MmioDevice, PortIo, Width};
use pgm::{Backing, Pgm};
use vbox_types::{GuestPhys, Port};

use super::bus::{Bus, Command, Done, status};
use super::sense::FIXED;
use super::sg::SgList;
use super::{Controller, EjectSink, TargetError};
use crate::ide::Drive;
use config::{Facts, HOST_ID, Name};
use spec::{
    Doorbell, HostDiagnostic, KEYS, Message, Reply, SG_CHAIN, SG_SIMPLE, SgFlags, doorbell, event, function,
    interrupt, ioc_status, reg, scsi_state, task,
};

/// Which controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// LSI53C1030: parallel SCSI with 16 targets, the controller itself being target 7.
    Spi,
    /// SAS1068: a port for each drive.
    Sas,
}

impl Model {
    /// Places for drives of the parallel controller.
    pub const SPI_TARGETS: usize = 16;
    /// Most ports of the SAS controller.
    pub const SAS_PORTS: usize = 255;

    const fn device(self) -> u16 {
        match self {
            Self::Spi => 0x0030,
            Self::Sas => 0x0054,
        }
    }

    const fn class(self) -> u8 {
        match self {
            Self::Spi => 0x00,
            Self::Sas => 0x07,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Spi => "lsilogicscsi",
            Self::Sas => "lsilogicsas",
        }
    }
}

/// What the controller is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    /// INTA# of the controller's slot.
    pub irq: IrqLine,
    pub ejected: Option<Arc<dyn EjectSink>>,
}

const PORTS: u16 = 256;
const REGISTERS: u64 = 0x4000;
const DIAGNOSTIC: u64 = 0x1_0000;
/// MMIO regions.
const REGION_REGISTERS: u32 = 0;
const REGION_DIAGNOSTIC: u32 = 1;

/// Requests that the guest may have under way, and replies that it may leave unread.
const CREDITS: usize = 1023;
/// Frames for replies that the guest may give.
const REPLY_FRAMES: usize = 1023;
/// Segments of a list of memory pieces.
const CHAIN_DEPTH: u8 = 34;
/// Elements that a list of memory pieces may have.
const MAX_ELEMENTS: usize = 4096;
/// Words of the longest message through the doorbell.
const MAX_MESSAGE: usize = Message::SIZE / 4;
/// Words of a request frame.
const FRAME_WORDS: u16 = 32;
/// Fault: the guest asks for more than it was told it may.
const FAULT_RESOURCES: u16 = 0x0006;

/// State of the IOC, as the doorbell tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ioc {
    Ready,
    Operational,
    Fault(u16),
}

/// What the doorbell is used for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Bell {
    Idle,
    /// Words of a message come in.
    Receiving {
        words: Vec<u32>,
        expected: usize,
    },
    /// Half-words of a reply go out.
    Replying {
        halves: Vec<u16>,
        next: usize,
    },
}

/// Guest-visible state beside the targets'. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    ioc: Ioc,
    bell: Bell,
    bell_interrupt: bool,
    interrupt_mask: u32,
    /// How many of the keys have been written.
    keys: u8,
    reply_free: VecDeque<u32>,
    reply_post: VecDeque<u32>,
    /// Replies that wait for a frame.
    pending: VecDeque<Reply>,
    // What IOC INIT said.
    who_init: u8,
    max_devices: u8,
    max_buses: u8,
    reply_size: u16,
    frames_high: u32,
    sense_high: u32,
    /// The guest wants events: the context for them.
    events: Option<u32>,
    spi_requests: Vec<[u32; 2]>,
}

impl State {
    fn reset(targets: usize) -> Self {
        Self {
            ioc: Ioc::Ready,
            bell: Bell::Idle,
            bell_interrupt: false,
            interrupt_mask: interrupt::MASK,
            keys: 0,
            reply_free: VecDeque::new(),
            reply_post: VecDeque::new(),
            pending: VecDeque::new(),
            who_init: 0,
            max_devices: 0,
            max_buses: 0,
            reply_size: 0,
            frames_high: 0,
            sense_high: 0,
            events: None,
            spi_requests: vec![[0; 2]; targets],
        }
    }

    fn interrupt_status(&self) -> u32 {
        let bell = if self.bell_interrupt { interrupt::DOORBELL } else { 0 };
        let reply = if self.reply_post.is_empty() { 0 } else { interrupt::REPLY };
        bell | reply
    }

    fn write_mask(&mut self, value: u32) {
        self.interrupt_mask = value & interrupt::MASK;
    }

    fn read_bell(&mut self) -> u32 {
        let mut value = Doorbell::new().with_who_init(self.who_init & 7);
        value = match self.ioc {
            Ioc::Ready => value.with_state(1),
            Ioc::Operational => value.with_state(2),
            Ioc::Fault(code) => value.with_state(4).with_data(code),
        };
        match &mut self.bell {
            Bell::Idle => {}
            Bell::Receiving { .. } => value = value.with_active(true),
            Bell::Replying { halves, next } => {
                value = value.with_active(true).with_data(halves.get(*next).copied().unwrap_or(0));
                *next = (*next + 1).min(halves.len());
            }
        }
        value.into()
    }

    /// The guest has taken the doorbell's interrupt; it comes again with the next half of a reply, and once more after the last.
    fn acknowledge(&mut self) {
        self.bell_interrupt = false;
        if let Bell::Replying { halves, next } = &self.bell {
            self.bell_interrupt = true;
            if *next == halves.len() {
                self.bell = Bell::Idle;
            }
        }
    }

    /// Takes a key of the sequence that unlocks the diagnostic register.
    fn write_key(&mut self, value: u32) {
        let all = KEYS.len() as u8;
        self.keys = match KEYS.get(usize::from(self.keys)) {
            Some(key) if u32::from(*key) == value & 0xf => self.keys + 1,
            // Any value locks it again.
            _ => 0,
        };
        debug_assert!(self.keys <= all);
    }

    fn is_unlocked(&self) -> bool {
        usize::from(self.keys) == KEYS.len()
    }

    fn fault(&mut self, code: u16) {
        tracing::warn!(target: "mpt", code, "the guest has made the controller stop: it needs a reset");
        self.ioc = Ioc::Fault(code);
    }
}

/// What a command is known by: its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Bytes 0 to 11: target, bus, function, lengths of command and sense buffer, context.
    header: [u8; 12],
    data: u64,
    sense_buffer: u32,
}

impl Request {
    fn context(&self) -> u32 {
        u32::from_le_bytes([self.header[8], self.header[9], self.header[10], self.header[11]])
    }
}

/// One controller.
pub struct Mpt {
    model: Model,
    irq: IrqLine,
    bus: Bus<Request>,
    state: State,
    devfn: u8,
    intx_disabled: bool,
    level: bool,
}

impl Mpt {
    /// Builds a controller with its drives; an LSI53C1030 has room for 16.
    ///
    /// # Panics
    /// Unless there are 16 places for drives (LSI53C1030), or 1 to 255 (SAS1068).
    pub fn new(model: Model, wiring: Wiring, drives: Vec<Option<Drive>>) -> Arc<Mutex<Self>> {
        let places = drives.len();
        match model {
            Model::Spi => assert!(places == Model::SPI_TARGETS, "{places} SPI targets"),
            Model::Sas => assert!((1..=Model::SAS_PORTS).contains(&places), "{places} SAS ports"),
        }
        Arc::new_cyclic(|me: &Weak<Mutex<Self>>| {
            let me = me.clone();
            let answer = move |number, result| {
                if let Some(me) = me.upgrade() {
                    me.lock().answered(number, result);
                }
            };
            Mutex::new(Self {
                model,
                irq: wiring.irq,
                bus: Bus::new(wiring.pgm, drives, wiring.ejected, Arc::new(answer)),
                state: State::reset(places),
                devfn: 0,
                intx_disabled: false,
                level: false,
            })
        })
    }

    /// Plugs the controller into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let model = this.lock().model;
        this.lock().devfn = at.0;
        let space = ConfigSpace::new(&Identity {
            vendor: 0x1000,
            device: model.device(),
            class: [0x01, model.class(), 0x00],
            subsystem_vendor: 0x1000,
            subsystem: 0x8000,
            interrupt_pin: 1,
            ..Identity::default()
        });
        let memory = |size, region| Bar::Memory {
            size,
            prefetchable: false,
            wide: false,
            backing: Backing::mmio(mmio_handler(this, region)),
        };
        let bars = vec![
            (0, Bar::Io { size: PORTS, widest: Width::Dword, handler: this.clone() }),
            (1, memory(REGISTERS, REGION_REGISTERS)),
            (2, memory(DIAGNOSTIC, REGION_DIAGNOSTIC)),
        ];
        bus.add(at, model.name(), space, bars, this.clone());
    }

    fn read(&mut self, register: u32) -> u32 {
        let value = match register {
            reg::DOORBELL => self.state.read_bell(),
            reg::HOST_DIAGNOSTIC => HostDiagnostic::new().with_write_enabled(self.state.is_unlocked()).into(),
            reg::INTERRUPT_STATUS => self.state.interrupt_status(),
            reg::INTERRUPT_MASK => self.state.interrupt_mask,
            reg::REPLY_QUEUE => self.state.reply_post.pop_front().unwrap_or(!0),
            _ => 0,
        };
        self.sync();
        value
    }

    fn write(&mut self, register: u32, value: u32) {
        match register {
            reg::DOORBELL => self.write_bell(value),
            reg::WRITE_SEQUENCE => self.state.write_key(value),
            reg::HOST_DIAGNOSTIC
                if self.state.is_unlocked() && HostDiagnostic::from(value).reset_adapter() =>
            {
                self.reset_ioc();
            }
            reg::HOST_DIAGNOSTIC => {}
            reg::INTERRUPT_STATUS => self.state.acknowledge(),
            reg::INTERRUPT_MASK => self.state.write_mask(value),
            reg::REQUEST_QUEUE => self.post(value),
            reg::REPLY_QUEUE => self.give_frame(value),
            _ => {}
        }
        self.sync();
    }

    /// Drops everything under way; the guest has to begin with IOC INIT.
    fn reset_ioc(&mut self) {
        self.bus.reset(None);
        while self.bus.take_done().is_some() {}
        self.state = State::reset(self.bus.places());
    }

    fn write_bell(&mut self, value: u32) {
        match &mut self.state.bell {
            Bell::Receiving { words, expected } => {
                words.push(value);
                if words.len() == *expected {
                    let mut bytes = [0; Message::SIZE];
                    for (to, word) in bytes.chunks_exact_mut(4).zip(words.iter()) {
                        to.copy_from_slice(&word.to_le_bytes());
                    }
                    self.state.bell = Bell::Idle;
                    self.handshake(&Message::new(bytes));
                }
            }
            // A reset ends a reply that nobody reads.
            _ => match (value >> 24) as u8 {
                doorbell::MESSAGE_UNIT_RESET | doorbell::IO_UNIT_RESET => self.reset_ioc(),
                doorbell::HANDSHAKE => {
                    let expected = (value >> 16 & 0xff) as usize;
                    if (1..=MAX_MESSAGE).contains(&expected) {
                        self.state.bell = Bell::Receiving { words: Vec::new(), expected };
                        self.state.bell_interrupt = true;
                    }
                }
                doorbell::REPLY_FRAME_REMOVAL => {
                    // The number of frames, then their addresses.
                    let frames = std::mem::take(&mut self.state.reply_free);
                    let words = std::iter::once(frames.len() as u32).chain(frames);
                    let halves = words.flat_map(|word| [word as u16, (word >> 16) as u16]).collect();
                    self.state.bell = Bell::Replying { halves, next: 0 };
                    self.state.bell_interrupt = true;
                }
                _ => {}
            },
        }
    }

    /// A message has come through the doorbell.
    fn handshake(&mut self, message: &Message) {
        match message.function() {
            // Those answer through the queue.
            function::TASK_MANAGEMENT => self.manage(message),
            function::SCSI_IO => {}
            _ => {
                let Reply(bytes) = self.execute(message);
                let halves =
                    bytes.chunks_exact(2).map(|half| u16::from_le_bytes([half[0], half[1]])).collect();
                self.state.bell = Bell::Replying { halves, next: 0 };
                self.state.bell_interrupt = true;
            }
        }
    }

    /// The guest gives a frame for replies.
    fn give_frame(&mut self, address: u32) {
        if self.state.reply_free.len() < REPLY_FRAMES {
            self.state.reply_free.push_back(address);
            self.deliver();
        } else {
            self.state.fault(FAULT_RESOURCES);
        }
    }

    /// The guest has posted a request.
    fn post(&mut self, value: u32) {
        if self.state.ioc != Ioc::Operational {
            return;
        }
        // The low bits say how much of the frame to fetch early. Frames are at multiples of four: SeaBIOS has them on its stack.
        let frame = u64::from(self.state.frames_high) << 32 | u64::from(value & !3);
        let mut bytes = [0; Message::SIZE];
        self.bus.memory().read(GuestPhys(frame), &mut bytes);
        let message = Message::new(bytes);
        match message.function() {
            function::SCSI_IO => self.scsi_io(&message, frame),
            function::TASK_MANAGEMENT => self.manage(&message),
            _ => {
                let reply = self.execute(&message);
                self.reply(reply);
            }
        }
        self.finish();
    }

    /// Queues a reply for the guest.
    fn reply(&mut self, reply: Reply) {
        if self.state.pending.len() >= CREDITS {
            return self.state.fault(FAULT_RESOURCES);
        }
        self.state.pending.push_back(reply);
        self.deliver();
    }

    /// Writes replies into the guest's frames as long as there are some.
    fn deliver(&mut self) {
        let state = &mut self.state;
        while !state.reply_free.is_empty() && state.reply_post.len() < CREDITS {
            let Some(Reply(mut bytes)) = state.pending.pop_front() else { return };
            let Some(frame) = state.reply_free.pop_front() else { return };
            bytes.truncate(usize::from(state.reply_size));
            let address = u64::from(state.frames_high) << 32 | u64::from(frame);
            self.bus.memory().write(GuestPhys(address), &bytes);
            state.reply_post.push_back(frame >> 1 | 1 << 31);
        }
    }

    /// Tells the guest of commands that have ended.
    fn finish(&mut self) {
        while let Some(done) = self.bus.take_done() {
            self.tell(done);
        }
    }

    fn tell(&mut self, done: Done<Request>) {
        let Done { tag: request, status, sense, moved } = done;
        if status == status::GOOD && moved == request.data {
            if self.state.reply_post.len() >= CREDITS {
                return self.state.fault(FAULT_RESOURCES);
            }
            // Bit 31 tells frames from contexts.
            return self.state.reply_post.push_back(request.context() & !(1 << 31));
        }
        let mut sensed = 0;
        if status == status::CHECK_CONDITION {
            let room = usize::from(request.header[5]).min(FIXED);
            let address = u64::from(self.state.sense_high) << 32 | u64::from(request.sense_buffer);
            self.bus.memory().write(GuestPhys(address), &sense.fixed()[..room]);
            sensed = room as u32;
        }
        let ioc = if moved < request.data { ioc_status::DATA_UNDERRUN } else { ioc_status::SUCCESS };
        let state = if sensed > 0 { scsi_state::AUTOSENSE_VALID } else { 0 };
        let reply = scsi_reply(&request, status, state, ioc).put(20, &(moved as u32).to_le_bytes());
        self.reply(reply.put(24, &sensed.to_le_bytes()));
    }

    /// Tells the guest that commands have been ended by force.
    fn terminated(&mut self, requests: Vec<Request>, why: u16) {
        for request in requests {
            let reply = scsi_reply(&request, 0, scsi_state::TERMINATED | scsi_state::NO_STATUS, why);
            self.reply(reply);
        }
    }

    fn scsi_io(&mut self, message: &Message, frame: u64) {
        let [target, bus] = message.bytes(0);
        let control = message.u32(20);
        let data = message.u32(40);
        let direction = control >> 24 & 3;
        let request = Request {
            header: message.bytes(0),
            data: if direction == 0 { 0 } else { data.into() },
            sense_buffer: message.u32(44),
        };
        let fail = |mpt: &mut Self, why| {
            mpt.reply(scsi_reply(&request, 0, scsi_state::NO_STATUS, why));
        };
        if bus != 0 {
            return fail(self, ioc_status::INVALID_BUS);
        }
        if usize::from(target) >= self.bus.places() {
            return fail(self, ioc_status::INVALID_TARGET);
        }
        let mut list = SgList::default();
        if direction != 0 && !read_list(self.bus.memory(), frame, message.u8(2), &mut list) {
            return fail(self, ioc_status::INVALID_SGL);
        }
        list.truncate(data.into());
        let (out, into) = if direction == 1 { (list, SgList::default()) } else { (SgList::default(), list) };
        let length = usize::from(message.u8(4));
        let mut cdb: [u8; 16] = message.bytes(24);
        cdb[length.min(16)..].fill(0);
        if self.bus.is_full(CREDITS) {
            return self.state.fault(FAULT_RESOURCES);
        }
        let lun = lun(message.bytes(12));
        let command = Command { target: target.into(), lun, cdb, out, into, tag: request };
        if let Err(command) = self.bus.command(command) {
            self.reply(scsi_reply(&command.tag, 0, scsi_state::NO_STATUS, ioc_status::DEVICE_NOT_THERE));
        }
    }

    fn manage(&mut self, message: &Message) {
        if self.state.ioc != Ioc::Operational {
            return;
        }
        let [target, bus] = message.bytes(0);
        let target = usize::from(target);
        let mut status = ioc_status::SUCCESS;
        let ended = match message.u8(5) {
            task::BUS_RESET => self.bus.reset(None),
            _ if bus != 0 => {
                status = ioc_status::INVALID_BUS;
                Vec::new()
            }
            _ if target >= self.bus.places() => {
                status = ioc_status::INVALID_TARGET;
                Vec::new()
            }
            task::ABORT_TASK => {
                let context = message.u32(48);
                self.bus.abort(|at, request| at == target && request.context() == context)
            }
            task::ABORT_TASK_SET => self.bus.abort(|at, _| at == target),
            task::TARGET_RESET | task::UNIT_RESET => self.bus.reset(Some(target)),
            _ => {
                status = ioc_status::INVALID_FIELD;
                Vec::new()
            }
        };
        let count = ended.len() as u32;
        self.terminated(ended, ioc_status::TASK_TERMINATED);
        let reply = Reply::to(message, 6, status).put(4, &[0]).put(20, &count.to_le_bytes());
        self.reply(reply);
    }

    /// Carries out a message that needs no drive.
    fn execute(&mut self, message: &Message) -> Reply {
        let ok = ioc_status::SUCCESS;
        match message.function() {
            function::IOC_INIT => {
                let state = &mut self.state;
                state.who_init = message.u8(0);
                (state.max_devices, state.max_buses) = (message.u8(5), message.u8(6));
                state.reply_size = message.u16(12);
                (state.frames_high, state.sense_high) = (message.u32(16), message.u32(20));
                if state.ioc == Ioc::Ready {
                    state.ioc = Ioc::Operational;
                }
                Reply::to(message, 5, ok)
            }
            function::IOC_FACTS => self.ioc_facts(message),
            function::PORT_FACTS => self.port_facts(message),
            function::PORT_ENABLE => Reply::to(message, 5, ok),
            function::EVENT_NOTIFICATION => {
                let on = message.u8(0) != 0;
                self.state.events = on.then(|| message.context());
                event_reply(message.context(), event::CHANGE, &u32::from(on).to_le_bytes())
            }
            function::EVENT_ACK => Reply::to(message, 5, ok),
            function::CONFIG => self.config(message),
            function::SAS_IO_UNIT_CONTROL if self.model == Model::Sas => Reply::to(message, 5, ok),
            _ => Reply::to(message, 5, ioc_status::INVALID_FUNCTION),
        }
    }

    fn ioc_facts(&self, message: &Message) -> Reply {
        let state = &self.state;
        let version: u16 = if self.model == Model::Spi { 0x0102 } else { 0x0105 };
        let fault = if let Ioc::Fault(code) = state.ioc { code } else { 0 };
        Reply::to(message, 15, ioc_status::SUCCESS)
            .put(0, &version.to_le_bytes())
            .put(4, &[0; 3])
            .put(12, &fault.to_le_bytes())
            // Segments of a list, who initialised, words fetched early, flags.
            .put(20, &[CHAIN_DEPTH, state.who_init, 12, 0])
            .put(24, &(REPLY_FRAMES as u16).to_le_bytes())
            .put(26, &FRAME_WORDS.to_le_bytes())
            .put(30, &0xcafeu16.to_le_bytes())
            .put(32, &state.frames_high.to_le_bytes())
            .put(36, &(CREDITS as u16).to_le_bytes())
            // One port; whether events are told.
            .put(38, &[1, u8::from(state.events.is_some())])
            .put(40, &state.sense_high.to_le_bytes())
            .put(44, &state.reply_size.to_le_bytes())
            .put(46, &[state.max_devices, state.max_buses])
    }

    fn port_facts(&self, message: &Message) -> Reply {
        let reply = Reply::to(message, 10, ioc_status::SUCCESS);
        if message.u8(6) != 0 {
            return reply;
        }
        let (kind, own): (u8, u16) = match self.model {
            Model::Spi => (0x01, HOST_ID.into()),
            Model::Sas => (0x30, self.bus.places() as u16),
        };
        reply
            .put(21, &[kind])
            .put(22, &(self.bus.places() as u16).to_le_bytes())
            .put(24, &own.to_le_bytes())
            // Initiator.
            .put(26, &9u16.to_le_bytes())
    }

    fn config(&mut self, message: &Message) -> Reply {
        let name = Name {
            kind: message.u8(23) & 0x0f,
            extended: message.u8(6),
            number: message.u8(22),
            address: message.u32(24),
        };
        let reply = Reply::to(message, 6, ioc_status::SUCCESS).put(20, &message.bytes::<4>(20));
        let invalid = |why: u16| reply.clone().put(14, &why.to_le_bytes());
        let present: Vec<bool> = (0..self.bus.places()).map(|target| self.bus.is_present(target)).collect();
        let facts = Facts {
            model: self.model,
            present: &present,
            spi_requests: &self.state.spi_requests,
            devfn: self.devfn,
        };
        let Some(page) = facts.page(name) else { return invalid(ioc_status::CONFIG_INVALID_PAGE) };
        // One element of memory for the page.
        let mut list = SgList::default();
        let flags = SgFlags::from(message.u8(31));
        let high = if flags.wide() { message.u32(36) } else { 0 };
        list.push(u64::from(high) << 32 | u64::from(message.u32(32)), message.u32(28) & 0xff_ffff);
        match message.u8(0) {
            // The header only; the defaults are what it has.
            0 | 4 => {}
            1 | 3 | 5 => {
                list.write(self.bus.memory(), 0, &page);
            }
            2 | 6 => {
                let mut bytes = vec![0; page.len()];
                let len = list.read(self.bus.memory(), 0, &mut bytes);
                if !config::write(name, &bytes[..len], &mut self.state.spi_requests) {
                    return invalid(ioc_status::CONFIG_CANT_COMMIT);
                }
            }
            _ => return invalid(ioc_status::CONFIG_INVALID_ACTION),
        }
        let reply = match name.kind {
            config::EXTENDED => reply.put(4, &page[4..7]).put(20, &[page[0], 0]),
            _ => reply.put(4, &[0; 3]).put(20, &page[..2]),
        };
        reply.put(22, &page[2..4])
    }

    /// Tells the guest that a SAS drive has come or gone.
    fn sas_event(&mut self, target: usize, reason: u8) {
        let Some(context) = self.state.events.filter(|_| self.model == Model::Sas) else { return };
        let handle = (self.bus.places() + target) as u16 + 1;
        let mut data = vec![target as u8, 0, reason, 0, 0, 0];
        data.extend_from_slice(&handle.to_le_bytes());
        data.extend_from_slice(&Facts::drive_info().to_le_bytes());
        // Parent, phy, address.
        data.extend_from_slice(&(target as u16 + 1).to_le_bytes());
        data.extend_from_slice(&[target as u8, 0]);
        data.extend_from_slice(&Facts::address(target, false));
        data.resize(36, 0);
        self.reply(event_reply(context, event::SAS_DEVICE_STATUS, &data));
    }

    fn answered(&mut self, number: u64, result: Result<Vec<u8>, BlockError>) {
        self.bus.answered(number, result);
        self.finish();
        self.sync();
    }

    fn sync(&mut self) {
        self.deliver();
        let active = self.state.interrupt_status() & !self.state.interrupt_mask & interrupt::MASK != 0;
        let level = active && !self.intx_disabled;
        if level != self.level {
            self.level = level;
            self.irq.set(level);
        }
    }
}

/// The number of a unit; anything but a plain one is a unit that is not there.
pub(super) fn lun(bytes: [u8; 8]) -> u64 {
    match bytes {
        [0 | 0x40, number, 0, 0, 0, 0, 0, 0] => number.into(),
        _ => u64::MAX,
    }
}

/// A reply to a SCSI I/O request that did not simply go well.
fn scsi_reply(request: &Request, status: u8, state: u8, ioc: u16) -> Reply {
    let mut bytes = vec![0; 32];
    bytes[..12].copy_from_slice(&request.header);
    bytes[2] = 8;
    (bytes[12], bytes[13]) = (status, state);
    bytes[14..16].copy_from_slice(&ioc.to_le_bytes());
    Reply(bytes)
}

/// A reply that tells of an event.
fn event_reply(context: u32, event: u32, data: &[u8]) -> Reply {
    let words = data.len().div_ceil(4);
    let mut bytes = vec![0; 28 + 4 * words];
    bytes[..2].copy_from_slice(&(words as u16).to_le_bytes());
    (bytes[2], bytes[3]) = ((bytes.len() / 4) as u8, function::EVENT_NOTIFICATION);
    // More replies come with this context.
    bytes[7] = 0x80;
    bytes[8..12].copy_from_slice(&context.to_le_bytes());
    bytes[20..24].copy_from_slice(&event.to_le_bytes());
    bytes[28..28 + data.len()].copy_from_slice(data);
    Reply(bytes)
}

/// Reads the list that follows a SCSI I/O request; `chain` is where in the frame, in words, its next segment is named, or 0. False
/// if it is no list.
fn read_list(memory: &Pgm, frame: u64, chain: u8, list: &mut SgList) -> bool {
    let mut segment = frame;
    let mut at = frame.wrapping_add(48);
    let mut chain = u64::from(chain) * 4;
    for _ in 0..MAX_ELEMENTS {
        let mut bytes = [0; 12];
        memory.read(GuestPhys(at), &mut bytes);
        let [l0, l1, l2, flags, a0, a1, a2, a3, h0, h1, h2, h3] = bytes;
        let flags = SgFlags::from(flags);
        let low = u32::from_le_bytes([a0, a1, a2, a3]);
        let high = if flags.wide() { u32::from_le_bytes([h0, h1, h2, h3]) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(low);
        match flags.kind() {
            SG_SIMPLE => {
                list.push(address, u32::from_le_bytes([l0, l1, l2, 0]));
                at = at.wrapping_add(if flags.wide() { 12 } else { 8 });
                if flags.end_of_list() {
                    return true;
                }
                if flags.last_element() {
                    if chain == 0 {
                        return true;
                    }
                    at = segment.wrapping_add(chain);
                }
            }
            SG_CHAIN => {
                (segment, at, chain) = (address, address, u64::from(l2) * 4);
            }
            _ => return false,
        }
    }
    false
}

impl PortIo for Mpt {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        let offset = u32::from(port.0 & (PORTS - 1));
        self.read(offset & !3) >> (8 * (offset & 3)) & width.ones()
    }

    fn port_write(&mut self, port: Port, _width: Width, value: u32) {
        let offset = u32::from(port.0 & (PORTS - 1));
        if offset & 3 == 0 {
            self.write(offset, value);
        }
    }
}

impl MmioDevice for Mpt {
    fn mmio_read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if region != REGION_REGISTERS {
            return;
        }
        let mut at = (offset & (REGISTERS - 1)) as u32;
        let mut rest = data;
        while !rest.is_empty() {
            let value = self.read(at & !3).to_le_bytes();
            let first = (at & 3) as usize;
            let (now, later) = rest.split_at_mut(rest.len().min(4 - first));
            now.copy_from_slice(&value[first..first + now.len()]);
            at = at.wrapping_add(now.len() as u32);
            rest = later;
        }
    }

    fn mmio_write(&mut self, region: u32, offset: u64, data: &[u8]) {
        if region != REGION_REGISTERS || offset & 3 != 0 {
            return;
        }
        let mut at = (offset & (REGISTERS - 1)) as u32;
        for word in data.chunks(4) {
            let mut bytes = [0; 4];
            bytes[..word.len()].copy_from_slice(word);
            self.write(at, u32::from_le_bytes(bytes));
            at = at.wrapping_add(4);
        }
    }
}

impl PciDevice for Mpt {
    fn config_written(&mut self, offset: u8, _width: Width, space: &mut ConfigSpace) {
        if offset & !3 == pci::reg::COMMAND {
            self.intx_disabled = space.u16(pci::reg::COMMAND) & pci::COMMAND_INTX_DISABLE != 0;
            self.sync();
        }
    }
}

impl Controller for Mpt {
    fn set_medium(&mut self, target: usize, medium: Medium, force: bool) -> Result<(), TargetError> {
        self.bus.set_medium(target, medium, force)
    }

    fn attach(&mut self, target: usize, drive: Drive) -> Result<(), TargetError> {
        self.bus.attach(target, drive)?;
        self.sas_event(target, event::ADDED);
        self.sync();
        Ok(())
    }

    fn detach(&mut self, target: usize) -> Result<(), TargetError> {
        let was_there = self.bus.is_present(target);
        let ended = self.bus.detach(target)?;
        self.terminated(ended, ioc_status::DEVICE_NOT_THERE);
        if was_there {
            self.sas_event(target, event::NOT_RESPONDING);
        }
        self.sync();
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.bus.is_idle()
    }
}

impl Device for Mpt {
    fn reset(&mut self) {
        self.bus.power_on();
        self.state = State::reset(self.bus.places());
        self.intx_disabled = false;
        self.sync();
    }
}
