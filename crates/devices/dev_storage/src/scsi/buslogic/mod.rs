//! The BusLogic BT-958D (104b:1040), as VirtualBox has it: a MultiMaster host adapter on the PCI bus with 16 targets, itself being
//! target 7. Source: BusLogic BT-948/958/958D Technical Reference Manual.
//!
//! The guest gives the adapter commands and parameters byte by byte. SCSI commands are command control blocks (CCB) in its memory: it
//! enters their addresses into outgoing mailboxes, and finds them in incoming ones when they have ended. Mailboxes and blocks have
//! 32-bit addresses, or 24-bit ones as on older adapters.
//!
//! **Left out.** The ports at ISA addresses (MODIFY I/O ADDRESS can only switch them off), EXECUTE SCSI COMMAND and the other
//! commands of the adapter's BIOS, linked commands, SCAM, target mode, the EEPROM: such commands are invalid.
//!
//! A hard or soft reset shows the diagnosis under way to the first look at the status; VirtualBox shows it for 50 ms.
//!
//! **Saved state**: see [`crate::scsi`].

mod saved;
mod spec;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{BlockError, Medium};
use pdm::iom::mmio_handler;
use pdm::pci::{self, Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, IrqLine, MmioDevice, PortIo, Width};
use pgm::Backing;
use vbox_types::{GuestPhys, Port};

use super::bus::{Bus, Command, Done, status};
use super::mpt::Wiring;
use super::sense::FIXED;
use super::sg::SgList;
use super::{Controller, TargetError};
use crate::ide::Drive;
use spec::{
    CCB_CDB, CCB_SIZE, CCB_STATUS, CDB_SIZE, Control, GEOMETRY, Status, action, adapter_status, be24,
    command, completion, interrupt, le32, local_ram, operation, reg,
};

/// Places for drives.
pub const TARGETS: usize = 16;
/// The adapter's own id.
const HOST_ID: usize = 7;
const PORTS: u16 = 32;
const REGISTERS: u64 = 0x1000;
/// Bytes of the longest reply, and parameters of the longest command.
const MAX_REPLY: usize = 256;
const MAX_PARAMETERS: usize = 256;
/// Commands under way; more find their device busy.
const MAX_COMMANDS: usize = 1024;
/// Pieces of one list.
const MAX_PIECES: u32 = 8192;
/// SCSI status of a device that takes no command now.
const BUSY: u8 = 8;

/// The mailboxes that the guest has set up: as many outgoing as incoming ones, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mailboxes {
    base: u32,
    count: u8,
    /// 24-bit addresses.
    old: bool,
    /// The next ones to look at and to fill.
    outgoing: u8,
    incoming: u8,
}

impl Mailboxes {
    fn size(&self) -> u64 {
        if self.old { 4 } else { 8 }
    }

    fn outgoing_at(&self) -> GuestPhys {
        GuestPhys(u64::from(self.base) + self.size() * u64::from(self.outgoing))
    }

    fn incoming_at(&self) -> GuestPhys {
        GuestPhys(u64::from(self.base) + self.size() * (u64::from(self.count) + u64::from(self.incoming)))
    }

    /// Where in a mailbox action and completion code are.
    fn code(&self) -> usize {
        if self.old { 0 } else { 7 }
    }
}

/// An end of a command that waits for its incoming mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    ccb: u32,
    adapter: u8,
    device: u8,
    code: u8,
}

/// Guest-visible state beside the targets'. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    diagnosing: bool,
    invalid: bool,
    /// The command whose parameters come in, and how many it has.
    operation: Option<(u8, usize)>,
    parameters: Vec<u8>,
    reply: VecDeque<u8>,
    /// The interrupt register.
    interrupt: u8,
    /// Causes that are told after it.
    pending: u8,
    interrupts_on: bool,
    /// Tell of outgoing mailboxes that are free again.
    tell_free: bool,
    strict: bool,
    wide_lun: bool,
    mailboxes: Option<Mailboxes>,
    ends: VecDeque<End>,
}

impl State {
    fn reset() -> Self {
        Self {
            diagnosing: false,
            invalid: false,
            operation: None,
            parameters: Vec::new(),
            reply: VecDeque::new(),
            interrupt: 0,
            pending: 0,
            interrupts_on: true,
            tell_free: false,
            strict: true,
            wide_lun: false,
            mailboxes: None,
            ends: VecDeque::new(),
        }
    }

    fn read_status(&mut self) -> u8 {
        if std::mem::take(&mut self.diagnosing) {
            return Status::new().with_diagnostic_active(true).into();
        }
        Status::new()
            .with_command_invalid(self.invalid)
            .with_data_in_ready(!self.reply.is_empty())
            .with_ready(self.operation.is_none() && self.reply.is_empty())
            .with_initialization_required(self.mailboxes.is_none())
            .into()
    }

    /// Tells the guest of something, after what it has been told and not acknowledged.
    fn raise(&mut self, cause: u8) {
        if self.interrupt == 0 {
            self.interrupt = interrupt::VALID | cause;
        } else {
            self.pending |= cause;
        }
    }

    fn acknowledge(&mut self) {
        self.interrupt = 0;
        for cause in [interrupt::COMMAND_COMPLETE, interrupt::MAILBOX_FREE, interrupt::MAILBOX_LOADED] {
            if self.pending & cause != 0 {
                self.pending &= !cause;
                return self.raise(cause);
            }
        }
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.reply.pop_front();
        if byte.is_some() && self.reply.is_empty() {
            self.raise(interrupt::COMMAND_COMPLETE);
        }
        byte.unwrap_or(0)
    }

    /// Takes a command or parameter; a command that is complete comes back with its parameters.
    fn write_command(&mut self, value: u8) -> Option<(u8, Vec<u8>)> {
        let Some((operation, wanted)) = &mut self.operation else {
            self.invalid = false;
            self.reply.clear();
            let Some(wanted) = command::parameters(value) else {
                self.invalid = true;
                self.raise(interrupt::COMMAND_COMPLETE);
                return None;
            };
            if wanted == 0 {
                return Some((value, Vec::new()));
            }
            self.operation = Some((value, wanted));
            return None;
        };
        self.parameters.push(value);
        if *operation == command::SET_OPTIONS && self.parameters.len() == 1 {
            *wanted += usize::from(value);
        }
        if self.parameters.len() < *wanted {
            return None;
        }
        let operation = *operation;
        self.operation = None;
        Some((operation, std::mem::take(&mut self.parameters)))
    }
}

/// What a command is known by: its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ccb {
    address: u32,
    /// With 24-bit addresses.
    old: bool,
    /// The guest wants to know how many bytes were not moved.
    residual: bool,
    data: u32,
    sense: u32,
    sense_room: u8,
}

/// One adapter.
pub struct BusLogic {
    irq: IrqLine,
    bus: Bus<Ccb>,
    state: State,
    /// The interrupt line that firmware has entered into the configuration space.
    interrupt_line: u8,
    intx_disabled: bool,
    level: bool,
}

impl BusLogic {
    /// Builds an adapter with its drives.
    ///
    /// # Panics
    /// Unless there are 16 places for drives.
    pub fn new(wiring: Wiring, drives: Vec<Option<Drive>>) -> Arc<Mutex<Self>> {
        assert!(drives.len() == TARGETS, "{} BusLogic targets", drives.len());
        Arc::new_cyclic(|me: &Weak<Mutex<Self>>| {
            let me = me.clone();
            let answer = move |number, result| {
                if let Some(me) = me.upgrade() {
                    me.lock().answered(number, result);
                }
            };
            Mutex::new(Self {
                irq: wiring.irq,
                bus: Bus::new(wiring.pgm, drives, wiring.ejected, Arc::new(answer)),
                state: State::reset(),
                interrupt_line: 0,
                intx_disabled: false,
                level: false,
            })
        })
    }

    /// Plugs the adapter into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let space = ConfigSpace::new(&Identity {
            vendor: 0x104b,
            device: 0x1040,
            revision: 1,
            class: [0x01, 0x00, 0x00],
            subsystem_vendor: 0x104b,
            subsystem: 0x1040,
            interrupt_pin: 1,
            ..Identity::default()
        });
        let ports = Bar::Io { size: PORTS, widest: Width::Byte, handler: this.clone() };
        let backing = Backing::mmio(mmio_handler(this, 0));
        let memory = Bar::Memory { size: REGISTERS, prefetchable: false, wide: false, backing };
        bus.add(at, "buslogic", space, vec![(0, ports), (1, memory)], this.clone());
    }

    fn read(&mut self, register: u8) -> u8 {
        let value = match register & 3 {
            reg::STATUS => self.state.read_status(),
            reg::DATA_IN => self.state.read_data(),
            reg::INTERRUPT => self.state.interrupt,
            _ => GEOMETRY,
        };
        self.sync();
        value
    }

    fn write(&mut self, register: u8, value: u8) {
        match register & 3 {
            reg::CONTROL => {
                let control = Control::from(value);
                if control.hard_reset() || control.soft_reset() {
                    self.reset_adapter();
                } else {
                    if control.bus_reset() {
                        self.reset_bus();
                    }
                    if control.interrupt_reset() {
                        self.state.acknowledge();
                    }
                }
            }
            reg::COMMAND => {
                if let Some((operation, parameters)) = self.state.write_command(value) {
                    self.execute(operation, &parameters);
                }
            }
            _ => {}
        }
        self.sync();
    }

    /// Drops everything under way; the guest has to set up its mailboxes anew.
    fn reset_adapter(&mut self) {
        self.bus.reset(None);
        while self.bus.take_done().is_some() {}
        self.state = State { diagnosing: true, ..State::reset() };
    }

    fn reset_bus(&mut self) {
        for ccb in self.bus.reset(None) {
            self.end(&ccb, adapter_status::DEVICE_RESET, 0, completion::ERROR);
        }
    }

    /// Carries out an adapter command.
    fn execute(&mut self, operation: u8, parameters: &[u8]) {
        let byte = |at: usize| parameters.get(at).copied().unwrap_or(0);
        let mut reply = Vec::new();
        match operation {
            command::EXECUTE_MAILBOX => return self.take_mail(),
            command::ENABLE_MAILBOX_FREE => {
                self.state.tell_free = byte(0) == 1;
                return;
            }
            // Only switching the ISA ports off, which were never on.
            command::MODIFY_IO_ADDRESS if matches!(byte(0), 6 | 7) => return,
            command::MODIFY_IO_ADDRESS => self.state.invalid = true,
            command::INITIALIZE_MAILBOX => self.set_mailboxes(byte(0), be24(&parameters[1..]), true),
            command::INITIALIZE_EXTENDED_MAILBOX => {
                self.set_mailboxes(byte(0), le32(&parameters[1..]), false)
            }
            command::INQUIRE_BOARD_ID => reply.extend_from_slice(b"AA50"),
            command::INQUIRE_VERSION_THIRD => reply.push(b'7'),
            command::INQUIRE_VERSION_LETTER => reply.push(b'B'),
            command::INQUIRE_DEVICES_LOW => reply.extend((0..8).map(|id| self.presence(id))),
            command::INQUIRE_DEVICES_HIGH => reply.extend((8..16).map(|id| self.presence(id))),
            command::INQUIRE_TARGETS => {
                let mask = (0..TARGETS).fold(0u16, |mask, id| mask | u16::from(self.presence(id)) << id);
                reply.extend_from_slice(&mask.to_le_bytes());
            }
            command::INQUIRE_CONFIGURATION => {
                // DMA channel 6 for want of any; the interrupt if it is one that can be told.
                let irq = match self.interrupt_line {
                    line @ (9..=12 | 14 | 15) => 1 << (line - 9),
                    _ => 0,
                };
                reply.extend_from_slice(&[0x40, irq, HOST_ID as u8]);
            }
            command::INQUIRE_PCI => {
                // No ISA address; terminated at both ends, information is valid.
                reply.extend_from_slice(&[0xff, self.interrupt_line, 0x93, 0]);
            }
            command::INQUIRE_MODEL => reply = sized(b"958D ", byte(0)),
            command::INQUIRE_SYNC_PERIOD => reply = sized(&[], byte(0)),
            command::INQUIRE_SETUP => reply = sized(&self.setup(), byte(0)),
            command::INQUIRE_EXTENDED_SETUP => reply = sized(&self.extended_setup(), byte(0)),
            command::ECHO => reply.push(byte(0)),
            command::FETCH_LOCAL_RAM => {
                let ram = local_ram();
                reply.extend((0..byte(1)).map(|i| ram[usize::from(byte(0).wrapping_add(i))]));
            }
            command::STRICT_ROUND_ROBIN if byte(0) < 2 => self.state.strict = byte(0) == 1,
            command::SET_CCB_FORMAT if byte(0) < 2 => self.state.wide_lun = byte(0) == 1,
            command::STRICT_ROUND_ROBIN | command::SET_CCB_FORMAT => self.state.invalid = true,
            command::ENABLE_INTERRUPT => {
                self.state.interrupts_on = byte(0) != 0;
                return;
            }
            // Times and rates of a bus that needs none.
            _ => {}
        }
        self.state.reply = reply.into();
        if self.state.reply.is_empty() {
            self.state.raise(interrupt::COMMAND_COMPLETE);
        }
    }

    fn presence(&self, id: usize) -> u8 {
        u8::from(id != HOST_ID && self.bus.is_present(id))
    }

    fn set_mailboxes(&mut self, count: u8, base: u32, old: bool) {
        if count == 0 {
            self.state.invalid = true;
        } else {
            self.state.mailboxes = Some(Mailboxes { base, count, old, outgoing: 0, incoming: 0 });
        }
    }

    fn setup(&self) -> [u8; 34] {
        let mut bytes = [0; 34];
        // Synchronous negotiation, parity.
        bytes[0] = 3;
        if let Some(mailboxes) = &self.state.mailboxes {
            bytes[4] = mailboxes.count;
            bytes[5..8].copy_from_slice(&mailboxes.base.to_be_bytes()[1..]);
        }
        // Signatures; the PCI bus.
        bytes[17..20].copy_from_slice(b"BDF");
        bytes
    }

    fn extended_setup(&self) -> [u8; 14] {
        let mut bytes = [0; 14];
        // Bus master; pieces of a list.
        bytes[0] = b'E';
        bytes[2..4].copy_from_slice(&(MAX_PIECES as u16).to_le_bytes());
        if let Some(mailboxes) = &self.state.mailboxes {
            bytes[4] = mailboxes.count;
            bytes[5..9].copy_from_slice(&mailboxes.base.to_le_bytes());
        }
        // Level-sensitive interrupt; version; wide and ultra.
        bytes[9] = 0x40;
        bytes[10..13].copy_from_slice(b"07B");
        bytes[13] = 0x09;
        bytes
    }

    /// Looks for outgoing mailboxes.
    fn take_mail(&mut self) {
        let Some(count) = self.state.mailboxes.as_ref().map(|m| m.count) else { return };
        let mut freed = false;
        // Each at most once, whatever the guest writes meanwhile.
        for _ in 0..count {
            let Some(mailboxes) = &mut self.state.mailboxes else { break };
            let (at, size, old, code) =
                (mailboxes.outgoing_at(), mailboxes.size() as usize, mailboxes.old, mailboxes.code());
            let mut bytes = [0; 8];
            self.bus.memory().read(at, &mut bytes[..size]);
            // In strict mode the guest fills them one after the other.
            if bytes[code] == action::FREE && self.state.strict {
                break;
            }
            mailboxes.outgoing = (mailboxes.outgoing + 1) % mailboxes.count;
            if bytes[code] == action::FREE {
                continue;
            }
            self.bus.memory().write(at.wrapping_add(code as u64), &[action::FREE]);
            freed = true;
            let ccb = if old { be24(&bytes[1..]) } else { le32(&bytes) };
            match bytes[code] {
                action::START => self.start(ccb, old),
                action::ABORT => self.abort(ccb, old),
                _ => self.post(End {
                    ccb,
                    adapter: adapter_status::INVALID_ACTION,
                    device: 0,
                    code: completion::INVALID_CCB,
                }),
            }
            self.finish();
        }
        if freed && self.state.tell_free {
            self.state.raise(interrupt::MAILBOX_FREE);
        }
    }

    fn abort(&mut self, address: u32, old: bool) {
        let ended = self.bus.abort(|_, ccb| ccb.address == address && ccb.old == old);
        if ended.is_empty() {
            self.post(End { ccb: address, adapter: 0, device: 0, code: completion::NOT_FOUND });
        }
        for ccb in ended {
            self.end(&ccb, adapter_status::ABORTED, 0, completion::ABORTED);
        }
    }

    /// Begins the command of a block.
    fn start(&mut self, address: u32, old: bool) {
        let mut block = [0; CCB_SIZE];
        self.bus.memory().read(GuestPhys(address.into()), &mut block);
        let code = block[0];
        let (target, lun) = match (old, self.state.wide_lun) {
            (true, _) => (block[1] >> 5, block[1] & 7),
            (false, true) => (block[16], block[17] & 0x3f),
            (false, false) => (block[16], block[17] & 7),
        };
        let (len, data) =
            if old { (be24(&block[4..]), be24(&block[7..])) } else { (le32(&block[4..]), le32(&block[8..])) };
        let cdb_len = usize::from(block[2]);
        let direction = block[1] >> 3 & 3;
        let list = match code {
            operation::INITIATOR | operation::RESIDUAL => {
                let mut list = SgList::default();
                list.push(data.into(), len);
                Some(list)
            }
            operation::SCATTER_GATHER | operation::RESIDUAL_SCATTER_GATHER => self.read_list(data, len, old),
            _ => None,
        };
        let list = if direction == 3 { Some(SgList::default()) } else { list };
        let sense = if old { address.wrapping_add((CCB_CDB + cdb_len) as u32) } else { le32(&block[36..]) };
        // 0 stands for the usual length, 1 for none.
        let sense_room = match block[3] {
            0 => 14,
            1 => 0,
            room => room,
        };
        let ccb = Ccb {
            address,
            old,
            residual: matches!(code, operation::RESIDUAL | operation::RESIDUAL_SCATTER_GATHER),
            data: list.as_ref().map_or(0, |list| u32::try_from(list.len()).unwrap_or(u32::MAX)),
            sense,
            sense_room,
        };
        let target = usize::from(target);
        if code == operation::DEVICE_RESET {
            return self.reset_device(target, &ccb);
        }
        let Some(list) = list else {
            return self.end(&ccb, adapter_status::INVALID_OPERATION, 0, completion::INVALID_CCB);
        };
        if target >= TARGETS || cdb_len > CDB_SIZE {
            return self.end(&ccb, adapter_status::INVALID_PARAMETER, 0, completion::ERROR);
        }
        if self.bus.is_full(MAX_COMMANDS) {
            return self.end(&ccb, adapter_status::COMPLETED, BUSY, completion::ERROR);
        }
        let mut cdb = [0; 16];
        cdb[..cdb_len].copy_from_slice(&block[CCB_CDB..CCB_CDB + cdb_len]);
        let (out, into) = match direction {
            1 => (SgList::default(), list),
            2 => (list, SgList::default()),
            // Either way, by what the command is.
            _ => (list.clone(), list),
        };
        let command = Command { target, lun: lun.into(), cdb, out, into, tag: ccb };
        if self.bus.command(command).is_err() {
            self.end(&ccb, adapter_status::SELECTION_TIMEOUT, 0, completion::ERROR);
        }
    }

    fn reset_device(&mut self, target: usize, ccb: &Ccb) {
        if !self.bus.is_present(target) {
            return self.end(ccb, adapter_status::SELECTION_TIMEOUT, 0, completion::ERROR);
        }
        for ended in self.bus.reset(Some(target)) {
            self.end(&ended, adapter_status::DEVICE_RESET, 0, completion::ERROR);
        }
        self.end(ccb, adapter_status::COMPLETED, 0, completion::GOOD);
    }

    /// The list of `len` bytes at `at`; none if it is longer than any may be.
    fn read_list(&self, at: u32, len: u32, old: bool) -> Option<SgList> {
        let size = if old { 6 } else { 8 };
        let count = len / size;
        if count > MAX_PIECES {
            return None;
        }
        let mut bytes = vec![0; (count * size) as usize];
        self.bus.memory().read(GuestPhys(at.into()), &mut bytes);
        let mut list = SgList::default();
        for piece in bytes.chunks_exact(size as usize) {
            let (len, address) =
                if old { (be24(piece), be24(&piece[3..])) } else { (le32(piece), le32(&piece[4..])) };
            list.push(address.into(), len);
        }
        Some(list)
    }

    /// Ends commands that the bus has ended.
    fn finish(&mut self) {
        while let Some(Done { tag: ccb, status, sense, moved }) = self.bus.take_done() {
            if status == status::CHECK_CONDITION {
                let room = usize::from(ccb.sense_room).min(FIXED);
                self.bus.memory().write(GuestPhys(ccb.sense.into()), &sense.fixed()[..room]);
            }
            if ccb.residual {
                let left = ccb.data.saturating_sub(u32::try_from(moved).unwrap_or(u32::MAX));
                let at = GuestPhys(u64::from(ccb.address) + 4);
                if ccb.old {
                    self.bus.memory().write(at, &left.to_be_bytes()[1..]);
                } else {
                    self.bus.memory().write(at, &left.to_le_bytes());
                }
            }
            let code = if status == status::GOOD { completion::GOOD } else { completion::ERROR };
            self.end(&ccb, adapter_status::COMPLETED, status, code);
        }
    }

    /// Enters a command's end into its block, and into a mailbox.
    fn end(&mut self, ccb: &Ccb, adapter: u8, device: u8, code: u8) {
        let at = GuestPhys(u64::from(ccb.address) + CCB_STATUS);
        self.bus.memory().write(at, &[adapter, device]);
        self.post(End { ccb: ccb.address, adapter, device, code });
    }

    fn post(&mut self, end: End) {
        if self.state.ends.len() < 2 * MAX_COMMANDS {
            self.state.ends.push_back(end);
        }
        self.deliver();
    }

    /// Fills incoming mailboxes as long as they are free.
    fn deliver(&mut self) {
        while let (Some(end), Some(mailboxes)) = (self.state.ends.front().copied(), &mut self.state.mailboxes)
        {
            let at = mailboxes.incoming_at();
            let mut code = [0];
            self.bus.memory().read(at.wrapping_add(mailboxes.code() as u64), &mut code);
            if code[0] != completion::FREE {
                return;
            }
            let End { ccb, adapter, device, code } = end;
            if mailboxes.old {
                let [_, high, mid, low] = ccb.to_be_bytes();
                self.bus.memory().write(at, &[code, high, mid, low]);
            } else {
                let [a, b, c, d] = ccb.to_le_bytes();
                self.bus.memory().write(at, &[a, b, c, d, adapter, device, 0, code]);
            }
            mailboxes.incoming = (mailboxes.incoming + 1) % mailboxes.count;
            self.state.ends.pop_front();
            self.state.raise(interrupt::MAILBOX_LOADED);
        }
    }

    fn answered(&mut self, number: u64, result: Result<Vec<u8>, BlockError>) {
        self.bus.answered(number, result);
        self.finish();
        self.sync();
    }

    fn sync(&mut self) {
        self.deliver();
        self.update_line();
    }

    fn update_line(&mut self) {
        let level = self.state.interrupt != 0 && self.state.interrupts_on && !self.intx_disabled;
        if level != self.level {
            self.level = level;
            self.irq.set(level);
        }
    }
}

/// As many bytes as the guest asks for, zeros behind what there is.
fn sized(bytes: &[u8], count: u8) -> Vec<u8> {
    let mut reply = bytes.to_vec();
    reply.resize(count.into(), 0);
    reply
}

impl PortIo for BusLogic {
    fn port_read(&mut self, port: Port, _width: Width) -> u32 {
        self.read(port.0 as u8).into()
    }

    fn port_write(&mut self, port: Port, _width: Width, value: u32) {
        self.write(port.0 as u8, value as u8);
    }
}

impl MmioDevice for BusLogic {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read((offset as u8).wrapping_add(i as u8));
        }
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        if let Some(byte) = data.first() {
            self.write(offset as u8, *byte);
        }
    }
}

impl PciDevice for BusLogic {
    fn config_written(&mut self, _offset: u8, _width: Width, space: &mut ConfigSpace) {
        self.intx_disabled = space.u16(pci::reg::COMMAND) & pci::COMMAND_INTX_DISABLE != 0;
        self.interrupt_line = space.byte(pci::reg::INTERRUPT_LINE);
        self.sync();
    }
}

impl Controller for BusLogic {
    fn set_medium(&mut self, target: usize, medium: Medium, force: bool) -> Result<(), TargetError> {
        self.bus.set_medium(target, medium, force)
    }

    fn attach(&mut self, target: usize, drive: Drive) -> Result<(), TargetError> {
        self.bus.attach(target, drive)
    }

    fn detach(&mut self, target: usize) -> Result<(), TargetError> {
        for ccb in self.bus.detach(target)? {
            self.end(&ccb, adapter_status::SELECTION_TIMEOUT, 0, completion::ERROR);
        }
        self.sync();
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.bus.is_idle()
    }
}

impl Device for BusLogic {
    fn reset(&mut self) {
        self.bus.power_on();
        self.state = State::reset();
        (self.interrupt_line, self.intx_disabled) = (0, false);
        self.sync();
    }
}
