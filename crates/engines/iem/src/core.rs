//! One vCPU's engine state and its access path to guest memory.

use std::sync::Arc;

use cpum::state::{cr0, cr4, efer, rflags, seg};
use cpum::{CpuState, ForcedActions, VcpuLink};
use em::{Exit, VmContext};
use parking_lot::Mutex;
use pgm::{Pgm, Target};
use vbox_types::{GuestPhys, VcpuId};

use crate::flags::Lazy;
use crate::memory::GuestMemory;
use crate::paging::{self, Access, Kind, Limits, PhysMemory};
use crate::tlb::{Bank, Cell, Frame, Frames, Tlb};
use crate::{Fault, debug};

/// Held by locked accesses that no single host instruction can do: device registers and operands across pages.
static SPLIT_LOCK: Mutex<()> = Mutex::new(());

/// On whose behalf memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The instruction's own operands, at the current privilege.
    Explicit,
    /// The processor itself (descriptor tables, task state, inner stacks), always as supervisor.
    System,
}

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub instructions: u64,
    pub blocks: u64,
    pub decoded: u64,
    pub decoded_bytes: u64,
    pub read_misses: u64,
    pub write_misses: u64,
    pub fetch_misses: u64,
    pub flushes: u64,
    pub space_changes: u64,
    pub code_writes: u64,
    pub mmio: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    pub exits: u64,
}

/// Which translations were dropped since somebody who keeps more of them last asked.
#[derive(Clone, Debug, Default)]
pub struct Flushed {
    pub all: bool,
    /// Translations that are not global, other than the user's.
    pub not_global: bool,
    /// The user's translations of address spaces, as a bit mask of their numbers (`Tlb::space`).
    pub spaces: u32,
    /// Single pages, by address space and linear address.
    pub pages: Vec<(u8, u64)>,
    /// Another address space is at work.
    pub changed: bool,
}

impl Flushed {
    /// Whether there is anything to follow.
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.all || self.not_global || self.changed || self.spaces != 0 || !self.pages.is_empty()
    }

    fn page(&mut self, space: usize, linear: u64) {
        if self.pages.len() < 16 {
            self.pages.push((space as u8, linear & !0xfff));
        } else {
            self.all = true;
        }
    }
}

/// The engine's state for one vCPU, apart from decoded blocks.
pub struct Core {
    pub ctx: Arc<VmContext>,
    pub id: VcpuId,
    pub link: Arc<VcpuLink>,
    pub tlb: Tlb,
    pub frames: Frames,
    pub bank: Bank,
    pub user: bool,
    pub(crate) override_smap: bool,
    pub paging: bool,
    /// 64-bit code.
    pub long: bool,
    /// The linear address that the latest page fault was raised for.
    pub fault_address: u64,
    /// The latest #GP(0) came from a non-canonical data address.
    pub(crate) noncanonical: bool,
    pub(crate) lazy: Lazy,
    /// `lazy` holds the arithmetic flags; otherwise RFLAGS does.
    pub(crate) lazy_valid: bool,
    /// Leave the running block after this instruction.
    pub stop: bool,
    /// Decoded code is not kept, and writes to it are not noticed.
    pub(crate) fleeting: bool,
    /// Mode-dependent fields must be derived anew.
    pub resync: bool,
    /// Instructions must be run one by one with debug checks.
    pub special: bool,
    pub exit: Option<Exit>,
    /// Tells apart everything that makes translated code addresses differ: mode, privilege, flush count.
    pub key: u64,
    pub flush_count: u64,
    /// For engines that derive more from translations than the TLB holds.
    pub flushed: Flushed,
    /// DR6 bits of data and I/O breakpoints hit by the running instruction.
    pub(crate) breakpoints: u64,
    /// No debug trap follows the instruction at work: it loaded SS, or delivered an event.
    pub(crate) no_trap: bool,
    pub(crate) limits: Limits,
    /// PAUSE instructions run.
    pub(crate) pauses: u32,
    pub stats: Stats,
    /// Writes to decoded pages since each was decoded, by a hash of the page.
    pub(crate) code_write_counts: Box<[(u64, u32)]>,
    pub(crate) unit: Option<crate::unit::Unit>,
}

/// Page tables as the walker sees them.
struct Tables<'a> {
    frames: &'a mut Frames,
    pgm: &'a Pgm,
}

impl Tables<'_> {
    fn frame(&mut self, address: u64) -> Option<Frame> {
        let pgm = self.pgm;
        self.frames.frame(address, |a| pgm.resolve(GuestPhys(a)))
    }
}

impl PhysMemory for Tables<'_> {
    fn read_u32(&mut self, address: u64) -> u32 {
        match self.frame(address) {
            Some(frame) => self.frames.read(frame, address & 0xfff),
            None => {
                let mut bytes = [0; 4];
                self.pgm.read(self.pgm.bus_address(GuestPhys(address)), &mut bytes);
                u32::from_le_bytes(bytes)
            }
        }
    }

    fn read_u64(&mut self, address: u64) -> u64 {
        match self.frame(address) {
            Some(frame) => self.frames.read(frame, address & 0xfff),
            None => {
                let mut bytes = [0; 8];
                self.pgm.read(self.pgm.bus_address(GuestPhys(address)), &mut bytes);
                u64::from_le_bytes(bytes)
            }
        }
    }

    fn set_bits(&mut self, address: u64, wide: bool, old: u64, bits: u64) -> bool {
        let Some(frame) = self.frame(address).filter(|f| f.writable) else {
            // Tables in ROM or nowhere: the bits are lost, as on the bus.
            return true;
        };
        let offset = address & 0xfff;
        let done = if wide {
            self.frames.compare_exchange(frame, offset, old, old | bits).is_ok()
        } else {
            self.frames.compare_exchange(frame, offset, old as u32, (old | bits) as u32).is_ok()
        };
        if done {
            self.frames.note_write(frame, offset, if wide { 8 } else { 4 });
        }
        done
    }
}

/// Whether an address is canonical with 48 address bits.
#[inline(always)]
pub fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

impl Core {
    pub fn new(ctx: Arc<VmContext>, id: VcpuId, unit: crate::unit::Unit) -> Self {
        let width = ctx.cpuid.raw(0x8000_0008, 0).eax & 0xff;
        let limits = Limits {
            phys_bits: if width == 0 { 36 } else { width.clamp(32, paging::MAX_PHYS_BITS) },
            huge: ctx.cpuid.raw(0x8000_0001, 0).edx & 1 << 26 != 0,
        };
        let link = ctx.links[id.index()].clone();
        Self {
            link,
            ctx,
            id,
            tlb: Tlb::default(),
            frames: Frames::default(),
            bank: Bank::Supervisor,
            user: false,
            override_smap: false,
            paging: false,
            long: false,
            fault_address: 0,
            noncanonical: false,
            lazy: Lazy::default(),
            lazy_valid: false,
            stop: false,
            fleeting: false,
            resync: true,
            special: false,
            exit: None,
            key: 0,
            flush_count: 0,
            flushed: Flushed::default(),
            breakpoints: 0,
            no_trap: false,
            limits,
            pauses: 0,
            stats: Stats::default(),
            code_write_counts: vec![(0, 0); 256].into(),
            unit: Some(unit),
        }
    }

    /// Instructions executed so far.
    pub fn instructions(&self) -> u64 {
        self.stats.instructions
    }

    // ---- flags ----

    /// Puts the arithmetic flags into RFLAGS.
    #[inline]
    pub fn sync_flags(&mut self, cpu: &mut CpuState) {
        if self.lazy_valid {
            cpu.rflags = cpu.rflags & !rflags::ARITH | self.lazy.to_rflags();
            self.lazy_valid = false;
        }
    }

    #[inline(always)]
    pub(crate) fn set_flags(&mut self, flags: Lazy) {
        self.lazy = flags;
        self.lazy_valid = true;
    }

    #[inline(always)]
    pub(crate) fn cf(&self, cpu: &CpuState) -> bool {
        if self.lazy_valid { self.lazy.cf() } else { cpu.rflags & rflags::CF != 0 }
    }

    #[inline(always)]
    pub(crate) fn of(&self, cpu: &CpuState) -> bool {
        if self.lazy_valid { self.lazy.of() } else { cpu.rflags & rflags::OF != 0 }
    }

    #[inline(always)]
    pub(crate) fn zf(&self, cpu: &CpuState) -> bool {
        if self.lazy_valid { self.lazy.zf() } else { cpu.rflags & rflags::ZF != 0 }
    }

    #[inline(always)]
    pub(crate) fn sf(&self, cpu: &CpuState) -> bool {
        if self.lazy_valid { self.lazy.sf() } else { cpu.rflags & rflags::SF != 0 }
    }

    #[inline(always)]
    pub(crate) fn pf(&self, cpu: &CpuState) -> bool {
        if self.lazy_valid { self.lazy.pf() } else { cpu.rflags & rflags::PF != 0 }
    }

    // ---- mode ----

    /// Derives what the access path keeps of the CPU's mode.
    pub fn update_mode(&mut self, cpu: &CpuState) {
        self.resync = false;
        let cpl = cpu.cpl();
        self.user = cpl == 3;
        self.paging = cpu.cr0 & cr0::PG != 0;
        self.long = cpu.is_64bit();
        self.override_smap = paging::smap_override(cpu);
        let aligned = self.user && cpu.cr0 & cr0::AM != 0 && cpu.rflags & rflags::AC != 0;
        self.bank = if aligned || debug::data_breakpoints(cpu) {
            Bank::Slow
        } else if self.user {
            Bank::User
        } else if cpu.cr4 & cr4::SMAP != 0 && self.override_smap {
            Bank::Override
        } else {
            Bank::Supervisor
        };
        // RF matters to breakpoints only.
        self.special = cpu.rflags & rflags::TF != 0 || cpu.dr7 & 0xff != 0 || cpu.inhibit_rip.is_some();
        self.update_key(cpu);
    }

    /// Without breakpoints nothing will ask for RF, which the next instruction clears in any case.
    #[inline(always)]
    pub fn drop_resume_flag(&self, cpu: &mut CpuState) {
        if !self.special {
            cpu.rflags &= !rflags::RF;
        }
    }

    /// Code size: 0 for 16-bit, 1 for 32-bit, 2 for 64-bit.
    pub(crate) fn code_size(cpu: &CpuState) -> u64 {
        if cpu.is_64bit() { 2 } else { cpu.seg[seg::CS].attr.big().into() }
    }

    fn update_key(&mut self, cpu: &CpuState) {
        self.key = self.flush_count << 3 | u64::from(self.user) << 2 | Self::code_size(cpu);
    }

    /// Drops all translations, or (`keep_global`) those of the address space at work that are not global.
    pub(crate) fn flush_tlb(&mut self, keep_global: bool) {
        self.stats.flushes += 1;
        self.tlb.flush(keep_global);
        if keep_global {
            self.flushed.not_global = true;
            self.flushed.spaces |= 1 << self.tlb.space();
        } else {
            self.flushed.all = true;
        }
        self.translations_changed();
    }

    /// Goes from the address space (PCID) `old` to `new`, and drops what is known of that unless `keep`.
    pub(crate) fn change_space(&mut self, old: u16, new: u16, keep: bool) {
        self.stats.space_changes += 1;
        let dropped = self.tlb.change_space(old, new, keep);
        self.stats.flushes += u64::from(dropped != 0);
        self.flushed.spaces |= dropped;
        self.flushed.not_global = true;
        self.flushed.changed = true;
        self.translations_changed();
    }

    /// Drops what is known of address spaces but the one at work: of one, or all.
    pub(crate) fn forget_spaces(&mut self, pcid: Option<u16>) {
        self.flushed.spaces |= self.tlb.forget_spaces(pcid);
        self.translations_changed();
    }

    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.flushed.spaces |= self.tlb.flush_page(linear);
        self.flushed.page(self.tlb.space(), linear);
        self.translations_changed();
    }

    fn translations_changed(&mut self) {
        self.flush_count += 1;
        self.resync = true;
        self.stop = true;
    }

    /// Carries out what other threads asked of this vCPU's translations.
    pub fn take_flush_requests(&mut self) {
        let mine = ForcedActions::TLB_FLUSH.union(ForcedActions::REMAP);
        if self.link.pending().intersects(mine) {
            self.link.clear(mine);
            let epoch = self.ctx.pgm.epoch();
            self.frames.clear(&mut self.tlb);
            self.stats.flushes += 1;
            self.flush_count += 1;
            self.flushed.all = true;
            self.resync = true;
            self.link.acknowledge_flush(epoch);
        }
    }

    /// Forgets everything derived from a state that was changed from outside.
    pub fn reset_derived(&mut self) {
        self.lazy_valid = false;
        self.frames.clear(&mut self.tlb);
        self.flush_count += 1;
        self.flushed.all = true;
        self.resync = true;
        self.noncanonical = false;
        self.breakpoints = 0;
        self.no_trap = false;
        self.exit = None;
    }

    /// Whether `size` bytes at `linear` can be written directly.
    #[inline(always)]
    pub(crate) fn writable(&self, linear: u64, size: u64) -> bool {
        self.tlb.writable(self.bank, linear, size)
    }

    // ---- translation ----

    pub(crate) fn frame(&mut self, physical: u64) -> Option<Frame> {
        let pgm = &self.ctx.pgm;
        self.frames.frame(physical, |a| pgm.resolve(GuestPhys(a)))
    }

    /// The physical address of `linear` for an access, or the page fault.
    pub(crate) fn translate(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        kind: Kind,
        who: Who,
    ) -> Result<(u64, bool), Fault> {
        if !self.paging {
            return Ok((linear & 0xffff_ffff, false));
        }
        let access = Access {
            kind,
            user: self.user && who == Who::Explicit,
            smap_override: self.override_smap && who == Who::Explicit,
        };
        let mut tables = Tables { frames: &mut self.frames, pgm: &self.ctx.pgm };
        match paging::translate(&mut tables, cpu, self.limits, linear, access) {
            Ok(t) => Ok((t.physical, t.global)),
            Err(code) => {
                self.fault_address = linear;
                Err(Fault::pf(code))
            }
        }
    }

    fn bank_of(&self, who: Who) -> Bank {
        match who {
            Who::Explicit => self.bank,
            Who::System => Bank::Supervisor,
        }
    }

    /// Translates and enters the result into the TLB if it may be used directly from now on.
    pub fn place(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        kind: Kind,
        who: Who,
    ) -> Result<(u64, Option<Frame>), Fault> {
        let (physical, global) = self.translate(cpu, linear, kind, who)?;
        let frame = self.frame(physical);
        if let Some(frame) = frame {
            let direct = match kind {
                Kind::Write => frame.writable && !self.frames.has_code(frame),
                _ => true,
            };
            if direct {
                if kind == Kind::Write {
                    let (memory, page) = self.frames.memory(frame);
                    memory.mark_dirty(page);
                }
                let bank = self.bank_of(who);
                self.tlb.fill(bank, linear, frame, global, kind);
            }
        }
        Ok((physical, frame))
    }

    /// Finds the code page at `linear`: the frame if it is memory, and the physical address.
    pub fn place_code(&mut self, cpu: &CpuState, linear: u64) -> Result<(u64, Option<Frame>), Fault> {
        self.stats.fetch_misses += 1;
        if cpu.msr.efer & efer::LMA != 0 && !canonical(linear) {
            return Err(Fault::GP0);
        }
        let (physical, global) = self.translate(cpu, linear, Kind::Fetch, Who::Explicit)?;
        let frame = self.frame(physical);
        if let Some(frame) = frame {
            self.tlb.fill(self.code_bank(), linear, frame, global, Kind::Fetch);
        }
        Ok((physical, frame))
    }

    /// The bank that fetches use; they are not subject to data breakpoints or alignment checks.
    pub fn code_bank(&self) -> Bank {
        if self.user { Bank::User } else { Bank::Supervisor }
    }

    /// Checks that do not depend on paging.
    fn precheck(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        size: u64,
        write: bool,
        who: Who,
    ) -> Result<(), Fault> {
        if cpu.msr.efer & efer::LMA != 0 && !(canonical(linear) && canonical(linear.wrapping_add(size - 1))) {
            self.noncanonical = true;
            return Err(Fault::GP0);
        }
        if self.bank == Bank::Slow && who == Who::Explicit {
            let checked = self.user && cpu.cr0 & cr0::AM != 0 && cpu.rflags & rflags::AC != 0;
            if checked && size.is_power_of_two() && size <= 8 && !linear.is_multiple_of(size) {
                return Err(Fault::AC);
            }
            self.breakpoints |= debug::match_data(cpu, linear, size, write);
        }
        Ok(())
    }

    fn wrap(&self, cpu: &CpuState, linear: u64) -> u64 {
        if cpu.msr.efer & efer::LMA != 0 { linear } else { linear & 0xffff_ffff }
    }

    // ---- physical ----

    /// Reads from the bus: memory, device registers, or ones.
    pub(crate) fn phys_read(&mut self, physical: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let view = self.ctx.pgm.resolve(GuestPhys(physical.wrapping_add(done as u64)));
            let count = view.len.clamp(1, (out.len() - done) as u64) as usize;
            let part = &mut out[done..done + count];
            match &view.read {
                Target::Memory { memory, offset } => {
                    if !memory.read(*offset, part) {
                        part.fill(0xff);
                    }
                }
                Target::Mmio { handler, offset } => {
                    self.stats.mmio += 1;
                    for (i, item) in part.chunks_mut(8).enumerate() {
                        handler.mmio_read(self.id, offset + 8 * i as u64, item);
                    }
                    self.stop = true;
                }
                Target::Open => part.fill(0xff),
            }
            done += count;
        }
    }

    /// Writes to the bus.
    pub(crate) fn phys_write(&mut self, physical: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let view = self.ctx.pgm.resolve(GuestPhys(physical.wrapping_add(done as u64)));
            let count = view.len.clamp(1, (data.len() - done) as u64) as usize;
            let part = &data[done..done + count];
            match &view.write {
                Target::Memory { memory, offset } => {
                    memory.write(*offset, part);
                    self.stop = true;
                }
                Target::Mmio { handler, offset } => {
                    self.stats.mmio += 1;
                    for (i, item) in part.chunks(8).enumerate() {
                        handler.mmio_write(self.id, offset + 8 * i as u64, item);
                    }
                    // The device may have changed the memory map.
                    self.stop = true;
                }
                Target::Open => {}
            }
            done += count;
        }
    }

    fn put(&mut self, physical: u64, frame: Option<Frame>, data: &[u8]) {
        match frame.filter(|f| f.writable) {
            Some(frame) => {
                let offset = physical & 0xfff;
                match *data {
                    [a] => self.frames.write(frame, offset, a),
                    [a, b] => self.frames.write(frame, offset, u16::from_le_bytes([a, b])),
                    [a, b, c, d] => self.frames.write(frame, offset, u32::from_le_bytes([a, b, c, d])),
                    [a, b, c, d, e, f, g, h] => {
                        self.frames.write(frame, offset, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                    }
                    _ => self.frames.write_bytes(frame, offset, data),
                }
                self.note_write(frame, offset, data.len() as u64);
            }
            None => self.phys_write(physical, data),
        }
    }

    /// Notes a write to a frame that was not made through a write tag.
    pub(crate) fn note_write(&mut self, frame: Frame, offset: u64, len: u64) {
        if !self.frames.has_code(frame) {
            let (memory, page) = self.frames.memory(frame);
            memory.mark_dirty(page);
            return;
        }
        self.stats.code_writes += 1;
        if self.frames.note_write(frame, offset, len) {
            self.stop = true;
        }
        // A page that is written over and over is data now: let it be written directly until code runs from it again.
        let key = frame.key();
        let slot = &mut self.code_write_counts[(key >> 12) as usize % 256];
        if slot.0 == key {
            slot.1 += 1;
            if slot.1 >= 256 {
                *slot = (0, 0);
                let (memory, page) = self.frames.memory(frame);
                memory.forget_code(page);
                self.stop = true;
            }
        } else {
            *slot = (key, 1);
        }
    }

    fn fetch_bytes(&mut self, physical: u64, frame: Option<Frame>, out: &mut [u8]) {
        match frame {
            Some(frame) => self.frames.read_bytes(frame, physical & 0xfff, out),
            None => self.phys_read(physical, out),
        }
    }

    // ---- linear, typed ----

    #[inline(always)]
    pub fn read<T: Cell>(&mut self, cpu: &CpuState, linear: u64) -> Result<T, Fault> {
        match self.tlb.read(self.bank, linear) {
            Some(value) => Ok(value),
            None => self.read_slow(cpu, linear, Who::Explicit),
        }
    }

    /// Reads as the processor itself does.
    #[inline]
    pub fn read_system<T: Cell>(&mut self, cpu: &CpuState, linear: u64) -> Result<T, Fault> {
        match self.tlb.read(Bank::Supervisor, linear) {
            Some(value) => Ok(value),
            None => self.read_slow(cpu, linear, Who::System),
        }
    }

    #[inline(always)]
    pub fn write<T: Cell>(&mut self, cpu: &CpuState, linear: u64, value: T) -> Result<(), Fault> {
        if self.tlb.write(self.bank, linear, value) {
            Ok(())
        } else {
            self.write_slow(cpu, linear, value, Who::Explicit)
        }
    }

    #[inline]
    pub fn write_system<T: Cell>(&mut self, cpu: &CpuState, linear: u64, value: T) -> Result<(), Fault> {
        if self.tlb.write(Bank::Supervisor, linear, value) {
            Ok(())
        } else {
            self.write_slow(cpu, linear, value, Who::System)
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Cell>(&mut self, cpu: &CpuState, linear: u64, who: Who) -> Result<T, Fault> {
        self.stats.read_misses += 1;
        let size = T::BYTES as u64;
        self.precheck(cpu, linear, size, false, who)?;
        if (linear & 0xfff) + size <= 0x1000 {
            let (physical, frame) = self.place(cpu, linear, Kind::Read, who)?;
            if let Some(frame) = frame {
                return Ok(self.frames.read(frame, physical & 0xfff));
            }
        }
        let mut bytes = [0; 8];
        self.read_pages(cpu, linear, &mut bytes[..T::BYTES], who)?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Cell>(&mut self, cpu: &CpuState, linear: u64, value: T, who: Who) -> Result<(), Fault> {
        self.stats.write_misses += 1;
        self.precheck(cpu, linear, T::BYTES as u64, true, who)?;
        let bytes = value.to_u64().to_le_bytes();
        self.write_pages(cpu, linear, &bytes[..T::BYTES], who)
    }

    /// Reads any number of bytes after the checks that do not depend on paging; all pages are translated before the first is read, which may
    /// have registers.
    fn read_pages(&mut self, cpu: &CpuState, linear: u64, out: &mut [u8], who: Who) -> Result<(), Fault> {
        let first = (0x1000 - (linear & 0xfff)) as usize;
        for at in std::iter::once(0).chain((first..out.len()).step_by(0x1000)).filter(|_| first < out.len()) {
            self.place(cpu, self.wrap(cpu, linear.wrapping_add(at as u64)), Kind::Read, who)?;
        }
        let mut done = 0;
        while done < out.len() {
            let at = self.wrap(cpu, linear.wrapping_add(done as u64));
            let count = (0x1000 - (at & 0xfff)).min((out.len() - done) as u64) as usize;
            let (physical, frame) = self.place(cpu, at, Kind::Read, who)?;
            self.fetch_bytes(physical, frame, &mut out[done..done + count]);
            done += count;
        }
        Ok(())
    }

    /// Writes any number of bytes; all pages are translated before the first is written.
    fn write_pages(&mut self, cpu: &CpuState, linear: u64, data: &[u8], who: Who) -> Result<(), Fault> {
        let first = (0x1000 - (linear & 0xfff)).min(data.len() as u64) as usize;
        let place = self.place(cpu, linear, Kind::Write, who)?;
        if first == data.len() {
            self.put(place.0, place.1, data);
            return Ok(());
        }
        let mut at = first;
        while at < data.len() {
            self.place(cpu, self.wrap(cpu, linear.wrapping_add(at as u64)), Kind::Write, who)?;
            at += 0x1000;
        }
        self.put(place.0, place.1, &data[..first]);
        at = first;
        while at < data.len() {
            let count = (data.len() - at).min(0x1000);
            let linear = self.wrap(cpu, linear.wrapping_add(at as u64));
            let (physical, frame) = self.place(cpu, linear, Kind::Write, who)?;
            self.put(physical, frame, &data[at..at + count]);
            at += count;
        }
        Ok(())
    }

    /// Replaces a value in memory, not atomically.
    #[inline(always)]
    pub fn update<T: Cell>(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        change: impl FnOnce(T) -> T,
    ) -> Result<(), Fault> {
        // `change` runs exactly once: in the fast path if there is a translation, else in the slow one.
        let mut change = Some(change);
        let done = self.tlb.update(self.bank, linear, |old: T| match change.take() {
            Some(change) => change(old),
            None => old,
        });
        match change {
            Some(change) if !done => self.update_slow(cpu, linear, change),
            _ => Ok(()),
        }
    }

    #[cold]
    #[inline(never)]
    fn update_slow<T: Cell>(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        change: impl FnOnce(T) -> T,
    ) -> Result<(), Fault> {
        self.probe_write(cpu, linear, T::BYTES as u32)?;
        let old = self.read(cpu, linear)?;
        self.write(cpu, linear, change(old))
    }

    /// Replaces a value in memory atomically; `change` may run several times. Gives the value before.
    #[inline(always)]
    pub fn atomic<T: Cell>(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        mut change: impl FnMut(T) -> T,
    ) -> Result<T, Fault> {
        if let Some(mut old) = self.tlb.read::<T>(self.bank, linear) {
            loop {
                match self.tlb.compare_exchange(self.bank, linear, old, change(old)) {
                    Some(Ok(())) => return Ok(old),
                    Some(Err(found)) => old = found,
                    None => break,
                }
            }
        }
        self.atomic_slow(cpu, linear, change)
    }

    #[cold]
    #[inline(never)]
    fn atomic_slow<T: Cell>(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        mut change: impl FnMut(T) -> T,
    ) -> Result<T, Fault> {
        self.stats.write_misses += 1;
        let size = T::BYTES as u64;
        self.precheck(cpu, linear, size, true, Who::Explicit)?;
        if (linear & 0xfff) + size <= 0x1000 {
            let (physical, frame) = self.place(cpu, linear, Kind::Write, Who::Explicit)?;
            if let Some(frame) = frame.filter(|f| f.writable) {
                let offset = physical & 0xfff;
                let mut old: T = self.frames.read(frame, offset);
                while let Err(found) = self.frames.compare_exchange(frame, offset, old, change(old)) {
                    old = found;
                }
                self.note_write(frame, offset, size);
                return Ok(old);
            }
        }
        self.probe_write(cpu, linear, T::BYTES as u32)?;
        let _guard = SPLIT_LOCK.lock();
        let old = self.read(cpu, linear)?;
        self.write(cpu, linear, change(old))?;
        Ok(old)
    }

    /// Atomic 16-byte compare-exchange at an aligned address; `Err` has what was found.
    pub(crate) fn compare_exchange_16(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        old: u128,
        new: u128,
    ) -> Result<Result<(), u128>, Fault> {
        self.precheck(cpu, linear, 16, true, Who::Explicit)?;
        let (physical, frame) = self.place(cpu, linear, Kind::Write, Who::Explicit)?;
        if let Some(frame) = frame.filter(|f| f.writable) {
            let result = self.frames.compare_exchange_16(frame, physical & 0xff0, old, new);
            self.note_write(frame, physical & 0xff0, 16);
            return Ok(result);
        }
        let _guard = SPLIT_LOCK.lock();
        let mut bytes = [0; 16];
        self.phys_read(physical, &mut bytes);
        let found = u128::from_le_bytes(bytes);
        self.phys_write(physical, &if found == old { new } else { found }.to_le_bytes());
        Ok(if found == old { Ok(()) } else { Err(found) })
    }

    /// The frame and offset behind `linear` for string instructions that work on whole pieces of pages.
    pub(crate) fn page_piece(
        &mut self,
        cpu: &CpuState,
        linear: u64,
        kind: Kind,
    ) -> Result<Option<(Frame, u64)>, Fault> {
        if self.bank == Bank::Slow {
            return Ok(None);
        }
        self.precheck(cpu, linear, 1, kind == Kind::Write, Who::Explicit)?;
        let (physical, frame) = self.place(cpu, linear, kind, Who::Explicit)?;
        Ok(frame.filter(|f| kind != Kind::Write || f.writable).map(|f| (f, physical & 0xfff)))
    }

    // ---- segmentation ----

    /// The linear address of `offset` in segment `s` outside 64-bit code, checked for `size` bytes.
    #[inline(always)]
    pub(crate) fn legacy_linear(
        cpu: &CpuState,
        s: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        let segment = &cpu.seg[s];
        let bits = segment.attr.into_bits();
        // A usable data segment that expands up (and is writable), and an offset within its limit.
        let (mask, want) = if write { (UNUSABLE | 0x1e, 0x12) } else { (UNUSABLE | 0x1c, 0x10) };
        if bits & mask == want && offset + (size - 1) <= u64::from(segment.limit) {
            return Ok(segment.base.wrapping_add(offset) & 0xffff_ffff);
        }
        Self::legacy_linear_slow(cpu, s, offset, size, write)
    }

    #[cold]
    #[inline(never)]
    fn legacy_linear_slow(
        cpu: &CpuState,
        s: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        let segment = &cpu.seg[s];
        let fault = if s == seg::SS { Fault::SS0 } else { Fault::GP0 };
        let kind = segment.attr.kind();
        if cpu.is_protected() {
            if segment.attr.unusable() {
                return Err(fault);
            }
            let code = kind & 8 != 0;
            if kind & 2 == 0 && (write || code) || write && code {
                return Err(fault);
            }
        }
        let last = offset + (size - 1);
        let limit = u64::from(segment.limit);
        let inside = if kind & 0xc == 4 {
            let top = if segment.attr.big() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if inside { Ok(segment.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(fault) }
    }
}

/// The bit of [`cpum::Descriptor`] that says unusable.
const UNUSABLE: u32 = 1 << 16;

impl GuestMemory for Core {
    fn linear(
        &mut self,
        cpu: &CpuState,
        s: usize,
        offset: u64,
        size: u32,
        write: bool,
    ) -> Result<u64, Fault> {
        let size = u64::from(size.max(1));
        if cpu.is_64bit() {
            let base = if s == seg::FS || s == seg::GS { cpu.seg[s].base } else { 0 };
            let linear = base.wrapping_add(offset);
            if canonical(linear) && canonical(linear.wrapping_add(size - 1)) {
                Ok(linear)
            } else {
                Err(if s == seg::SS { Fault::SS0 } else { Fault::GP0 })
            }
        } else {
            Self::legacy_linear(cpu, s, offset, size, write)
        }
    }

    fn read_bytes(&mut self, cpu: &CpuState, linear: u64, out: &mut [u8]) -> Result<(), Fault> {
        let size = out.len() as u64;
        if size == 0 {
            return Ok(());
        }
        self.precheck(cpu, linear, size, false, Who::Explicit)?;
        self.read_pages(cpu, linear, out, Who::Explicit)
    }

    fn write_bytes(&mut self, cpu: &CpuState, linear: u64, data: &[u8]) -> Result<(), Fault> {
        let size = data.len() as u64;
        if size == 0 {
            return Ok(());
        }
        self.precheck(cpu, linear, size, true, Who::Explicit)?;
        self.write_pages(cpu, linear, data, Who::Explicit)
    }

    fn probe_write(&mut self, cpu: &CpuState, linear: u64, size: u32) -> Result<(), Fault> {
        let size = u64::from(size.max(1));
        self.precheck(cpu, linear, size, true, Who::Explicit)?;
        self.place(cpu, linear, Kind::Write, Who::Explicit)?;
        let end = linear.wrapping_add(size - 1);
        let mut at = (linear & !0xfff).wrapping_add(0x1000);
        while (linear & 0xfff) + size > 0x1000 && at <= end {
            self.place(cpu, self.wrap(cpu, at), Kind::Write, Who::Explicit)?;
            at += 0x1000;
        }
        Ok(())
    }
}
