//! x87, MMX, SSE and AVX instructions, executed on the host's own unit.
//!
//! The caller decodes, asks [`classify`] whether an instruction belongs here, has [`Class::check`] raise #UD, #NM and pending
//! #MF, computes the address, reads the operand, and calls [`Unit::execute`] with the operand's bytes (and writes them back
//! where [`Class::access`] says so). Instructions with [`Route::Memory`] make several accesses or accesses of a size known only at
//! run time; they go to [`Unit::execute_memory`].
//!
//! `Unit` re-encodes each instruction with its memory operand replaced by a host pointer and general registers by scratch
//! registers, wraps it with loads and stores of the guest registers that it names, and keeps the result as a stub (`stub`,
//! `code`). Guest rounding and denormal control are in force while the instruction runs; its exceptions are masked. Where
//! the guest unmasks SSE exceptions, the effects are undone and #XM is raised from the flags (`Unit::execute`). x87
//! instructions run under the guest's own control word: the host unit then defers #MF exactly as the architecture says, and the stub leaves
//! before the host would take it.
//! With all exceptions masked and no stack fault in sight the common ones take a shorter way (`fast`).
//!
//! State format: `CpuState::xsave`, XSAVE standard format. Model choices:
//! * FIP, FOP and FDP are written by every non-control x87 instruction (FDP only by those with a memory operand), FCS and FDS
//!   read as zero: CPUID.7.EBX bit 13 ("deprecates FCS and FDS") is set, bit 6 ("FDP on exceptions only") is clear. In real and
//!   virtual-8086 mode FIP and FDP hold linear addresses, as their FSTENV format wants.
//! * An unmasked SSE overflow or underflow always sets PE too; a CPU leaves it clear if the result would have been exact with an
//!   unbounded exponent. A dot product with an unmasked exception reports the flags of all its steps; a CPU stops at the first.
//! * Where makes differ in what raises #GP or switches to MMX, the host's make decides; the guest's CPU is of the same make.
//! * MXCSR bit 17 (AMD's misaligned mode) does not exist.

mod class;
mod code;
mod element;
mod fast;
mod legacy;
mod stub;
mod x87;
mod xsave;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::HashMap;

use cpum::CpuState;
use cpum::cpuid::CpuidTable;
use cpum::state::{XsaveArea, cr0, cr4};
use iced_x86::{Instruction, Register};

pub(crate) use class::is_amd;
pub use class::{Access, Class, Features, Kind, Route, classify};
pub use xsave::in_use;

use crate::{Fault, GuestMemory};
use code::CodeMemory;
use stub::{Frame, Recipe, Stub};

/// Byte offsets in the XSAVE area (Intel SDM volume 1, table 10-2 and section 13.4).
pub(crate) mod area {
    pub(crate) const FCW: usize = 0;
    pub(crate) const FSW: usize = 2;
    /// Abridged: one bit per physical register, set where it is not empty.
    pub(crate) const FTW: usize = 4;
    pub(crate) const FOP: usize = 6;
    pub(crate) const FIP: usize = 8;
    pub(crate) const FDP: usize = 16;
    pub(crate) const MXCSR: usize = 24;
    pub(crate) const MXCSR_MASK: usize = 28;
    /// ST(0); slots are relative to the top of the stack, 16 bytes apart.
    pub(crate) const ST: usize = 32;
    pub(crate) const XMM: usize = 160;
    /// End of what FXSAVE writes; the rest up to 512 is for software.
    pub(crate) const XMM_END: usize = 416;
    pub(crate) const XSTATE_BV: usize = 512;
    pub(crate) const XCOMP_BV: usize = 520;
    pub(crate) const YMM: usize = 576;
}

/// MXCSR bits that exist.
pub const MXCSR_MASK: u32 = 0xffff;
/// All SSE exceptions masked, none raised.
const MXCSR_DEFAULT: u32 = 0x1f80;
const MXCSR_UNDERFLOW: u32 = 1 << 4;
const MXCSR_FLUSH: u32 = 1 << 15;
/// Invalid, denormal, divide: found before a result is computed.
const PRE_COMPUTATION: u32 = 0b111;

/// Code memory of one unit, in bytes.
const CODE_BYTES: usize = 4 << 20;
/// Most stubs kept at a time.
const MAX_STUBS: usize = 64 << 10;
/// Largest memory operand that stubs see, in bytes.
const MAX_OPERAND: usize = 32;

/// Names a stub of one [`Unit`]; kept with the decoded instruction. It goes stale when the unit drops its stubs, which
/// [`Unit::execute`] repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StubId {
    index: u32,
    generation: u32,
}

impl StubId {
    /// No stub yet: the first execution resolves it.
    pub const NONE: Self = Self { index: 0, generation: 0 };
}

/// What distinguishes stubs: the instruction with its memory operand reduced to "the operand", and the x87 opcode field.
type Key = (Instruction, u16);

/// One vCPU's x87/SSE/AVX execution unit.
pub struct Unit {
    features: Features,
    code: CodeMemory,
    stubs: Vec<Stub>,
    by_key: HashMap<Key, u32>,
    generation: u32,
    frame: Box<Frame>,
    stub_flushes: u64,
}

impl Unit {
    /// A unit that executes what both `cpuid` announces and the host has.
    pub fn new(cpuid: &CpuidTable) -> std::io::Result<Self> {
        Self::with_features(Features::announced(cpuid).intersection(Features::host()))
    }

    /// A unit that executes all that the host has.
    pub fn of_host() -> std::io::Result<Self> {
        Self::with_features(Features::host())
    }

    fn with_features(features: Features) -> std::io::Result<Self> {
        Ok(Self {
            features,
            code: CodeMemory::new(CODE_BYTES)?,
            stubs: Vec::new(),
            by_key: HashMap::new(),
            generation: 1,
            frame: Box::new(Frame::new()),
            stub_flushes: 0,
        })
    }

    /// How often the stub cache was dropped because it was full.
    pub fn stub_flushes(&self) -> u64 {
        self.stub_flushes
    }

    /// Stubs in the cache.
    pub fn stub_count(&self) -> usize {
        self.stubs.len()
    }

    /// Resolves an instruction to its stub, making it if need be. #UD: the unit does not have it (not announced in CPUID, or
    /// the host lacks it).
    pub fn prepare(&mut self, insn: &Instruction) -> Result<StubId, Fault> {
        let class = classify(insn).ok_or(Fault::UD)?;
        if !self.features.contains(class.features) {
            return Err(Fault::UD);
        }
        let key = stub::key(insn, class.kind);
        if let Some(&index) = self.by_key.get(&key) {
            return Ok(StubId { index, generation: self.generation });
        }
        if self.stubs.len() >= MAX_STUBS {
            self.flush();
        }
        let mut built = stub::build(&key.0, insn, &class, key.1).ok_or(Fault::UD)?;
        if !built.code.is_empty() {
            let entry = match self.code.append(&built.code) {
                Some(entry) => entry,
                None => {
                    self.flush();
                    self.code.append(&built.code).ok_or(Fault::UD)?
                }
            };
            built.stub.entry = entry;
        }
        let index = self.stubs.len() as u32;
        self.stubs.push(built.stub);
        self.by_key.insert(key, index);
        Ok(StubId { index, generation: self.generation })
    }

    fn flush(&mut self) {
        self.code.clear();
        self.stubs.clear();
        self.by_key.clear();
        self.generation = self.generation.wrapping_add(1).max(1);
        self.stub_flushes += 1;
    }

    /// Executes an instruction of [`Route::Operand`].
    ///
    /// `slot` remembers the stub between executions; start with [`StubId::NONE`]. `mem` is the memory operand's bytes
    /// ([`Class::size`] of them, empty without memory operand), updated where the instruction writes; on a fault its content means
    /// nothing and must not be written back. `offset` is the operand's offset in its segment (for FDP). `cpu.rip` is the
    /// instruction's address. [`Class::check`] must have passed.
    pub fn execute(
        &mut self,
        slot: &Cell<StubId>,
        insn: &Instruction,
        cpu: &mut CpuState,
        mem: &mut [u8],
        offset: u64,
    ) -> Result<(), Fault> {
        let mut id = slot.get();
        if id.generation != self.generation {
            id = self.prepare(insn)?;
            slot.set(id);
        }
        let stub = self.stubs[id.index as usize];
        if mem.len() < usize::from(stub.size) {
            debug_assert!(false, "operand of {} bytes for {insn:?}", mem.len());
            return Err(Fault::UD);
        }
        match stub.recipe {
            Recipe::Vector => {
                let bytes = usize::from(stub.size);
                if (mem.as_ptr() as usize).is_multiple_of(MAX_OPERAND) {
                    self.run_vector(&stub, cpu, mem)
                } else {
                    let mut aligned = Aligned([0; MAX_OPERAND]);
                    aligned.0[..bytes].copy_from_slice(&mem[..bytes]);
                    let result = self.run_vector(&stub, cpu, &mut aligned.0);
                    mem[..bytes].copy_from_slice(&aligned.0[..bytes]);
                    result
                }
            }
            Recipe::X87 => {
                self.run_x87(&stub, cpu, mem);
                x87::note_pointers(cpu, &stub, offset);
                Ok(())
            }
            Recipe::Legacy(action) => legacy::execute(action, cpu, mem),
            Recipe::Memory => Err(Fault::UD),
        }
    }

    /// Executes an instruction of [`Route::Memory`]. `address` computes nothing: the effective address comes from `insn` and
    /// `cpu`, through `ea`, the offset of the operand in its segment (ignored by gathers, which compute their own).
    pub fn execute_memory(
        &mut self,
        insn: &Instruction,
        cpu: &mut CpuState,
        memory: &mut dyn GuestMemory,
        ea: u64,
    ) -> Result<(), Fault> {
        let class = classify(insn).ok_or(Fault::UD)?;
        if !self.features.contains(class.features) {
            return Err(Fault::UD);
        }
        if class.kind == Kind::Xsave {
            xsave::execute(insn, cpu, memory, ea)
        } else {
            element::execute(insn, cpu, memory, ea)
        }
    }

    fn run_vector(&mut self, stub: &Stub, cpu: &mut CpuState, mem: &mut [u8]) -> Result<(), Fault> {
        if stub.mmx {
            x87::enter_mmx(cpu);
        }
        if !stub.mxcsr {
            self.call(stub, cpu, mem);
            return Ok(());
        }
        let mxcsr = mxcsr(&cpu.xsave);
        self.frame.mxcsr_in = (mxcsr & 0xe040) | MXCSR_DEFAULT;
        let unmasked = !(mxcsr >> 7) & 0x3f;
        if unmasked == 0 {
            self.call(stub, cpu, mem);
            set_mxcsr(&mut cpu.xsave, mxcsr | (self.frame.mxcsr_out & 0x3f));
            return Ok(());
        }
        self.run_unmasked(stub, cpu, mem, mxcsr, unmasked)
    }

    /// Executes with some SSE exceptions unmasked: all effects are kept aside until the flags say that none of these arose.
    #[cold]
    fn run_unmasked(
        &mut self,
        stub: &Stub,
        cpu: &mut CpuState,
        mem: &mut [u8],
        mxcsr: u32,
        unmasked: u32,
    ) -> Result<(), Fault> {
        let before = (cpu.xsave.clone(), cpu.gpr, cpu.rflags);
        let undo = |cpu: &mut CpuState| {
            cpu.xsave = before.0.clone();
            cpu.gpr = before.1;
            cpu.rflags = before.2;
        };
        let size = usize::from(stub.size);
        let mut saved_mem = [0; MAX_OPERAND];
        saved_mem[..size].copy_from_slice(&mem[..size]);
        let mut flags = 0;
        if unmasked & MXCSR_UNDERFLOW != 0 {
            // Unmasked underflow is raised for tiny results even if they are exact; flush mode shows tininess.
            self.frame.mxcsr_in |= MXCSR_FLUSH;
            self.call(stub, cpu, mem);
            flags |= self.frame.mxcsr_out & MXCSR_UNDERFLOW;
            undo(cpu);
            mem[..size].copy_from_slice(&saved_mem[..size]);
            self.frame.mxcsr_in = (mxcsr & 0x6040) | MXCSR_DEFAULT;
        }
        self.call(stub, cpu, mem);
        flags |= self.frame.mxcsr_out & 0x3f;
        if let Some(halves) = stub.halves {
            // Flush mode does not show its tiny results; those not flagged as inexact are denormal numbers.
            let results = match halves.register {
                Some(n) => &cpu.xsave.0[area::XMM + 16 * usize::from(n)..][..2 * halves.count],
                None => &mem[..2 * halves.count],
            };
            let denormal = |half: &[u8]| half[1] & 0x7c == 0 && (half[0] != 0 || half[1] & 3 != 0);
            if unmasked & MXCSR_UNDERFLOW != 0 && results.chunks_exact(2).any(denormal) {
                flags |= MXCSR_UNDERFLOW;
            }
        }
        if flags & unmasked & PRE_COMPUTATION != 0 {
            flags &= PRE_COMPUTATION;
        }
        if flags & unmasked != 0 {
            undo(cpu);
        }
        set_mxcsr(&mut cpu.xsave, mxcsr | flags);
        if flags & unmasked == 0 {
            Ok(())
        } else if cpu.cr4 & cr4::OSXMMEXCPT != 0 {
            Err(Fault::XM)
        } else {
            Err(Fault::UD)
        }
    }

    fn run_x87(&mut self, stub: &Stub, cpu: &mut CpuState, mem: &mut [u8]) {
        if let Some(plan) = stub.fast
            && plan.applies(&cpu.xsave)
        {
            let short = Stub { entry: stub.entry + u32::from(plan.start), ..*stub };
            self.call(&short, cpu, mem);
            plan.finish(&mut cpu.xsave, &self.frame);
            return;
        }
        let image = &mut self.frame.x87.0;
        image[area::FCW..area::FOP].copy_from_slice(&cpu.xsave.0[area::FCW..area::FOP]);
        image[area::ST..area::XMM].copy_from_slice(&cpu.xsave.0[area::ST..area::XMM]);
        self.call(stub, cpu, mem);
        let image = &self.frame.x87.0;
        cpu.xsave.0[area::FCW..area::FOP].copy_from_slice(&image[area::FCW..area::FOP]);
        cpu.xsave.0[area::ST..area::XMM].copy_from_slice(&image[area::ST..area::XMM]);
        x87::update_summary(&mut cpu.xsave);
    }

    fn call(&mut self, stub: &Stub, cpu: &mut CpuState, mem: &mut [u8]) {
        if stub.flags {
            use cpum::state::rflags::{ARITH, FIXED};
            self.frame.flags = (cpu.rflags & ARITH) | FIXED;
            self.code.call(stub, cpu, mem, &mut self.frame);
            cpu.rflags = (cpu.rflags & !ARITH) | (self.frame.flags & ARITH);
        } else {
            self.code.call(stub, cpu, mem, &mut self.frame);
        }
    }
}

#[repr(align(32))]
struct Aligned([u8; MAX_OPERAND]);

pub(crate) fn u16_at(area: &XsaveArea, offset: usize) -> u16 {
    u16::from_le_bytes([area.0[offset], area.0[offset + 1]])
}

pub(crate) fn set_u16(area: &mut XsaveArea, offset: usize, value: u16) {
    area.0[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
}

/// Whether an x87 exception is pending that keeps a store from being done: any that is unmasked but inexact results.
pub(crate) fn stores_nothing(cpu: &CpuState) -> bool {
    u16_at(&cpu.xsave, area::FSW) & !u16_at(&cpu.xsave, area::FCW) & 0x1f != 0
}

/// The x87 registers in use, one bit each (FXSAVE's form).
pub(crate) fn tags(cpu: &CpuState) -> u16 {
    u16_at(&cpu.xsave, area::FTW)
}

pub(crate) fn set_tags(cpu: &mut CpuState, tags: u16) {
    set_u16(&mut cpu.xsave, area::FTW, tags);
}

pub(crate) fn u64_at(area: &XsaveArea, offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&area.0[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

pub(crate) fn set_u64(area: &mut XsaveArea, offset: usize, value: u64) {
    area.0[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

/// The guest's MXCSR.
pub fn mxcsr(area: &XsaveArea) -> u32 {
    u64_at(area, area::MXCSR) as u32 & MXCSR_MASK
}

pub(crate) fn set_mxcsr(area: &mut XsaveArea, value: u32) {
    area.0[area::MXCSR..area::MXCSR + 4].copy_from_slice(&(value & MXCSR_MASK).to_le_bytes());
}

/// The number of a vector register (XMM or YMM), 0 to 15.
pub(crate) fn vector_number(register: Register) -> Option<usize> {
    let number = register.number();
    ((register.is_xmm() || register.is_ymm()) && number < 16).then_some(number)
}

/// Checks that need CR0 only, shared by the classes.
pub(crate) fn task_switched(cpu: &CpuState) -> Result<(), Fault> {
    if cpu.cr0 & cr0::TS != 0 { Err(Fault::NM) } else { Ok(()) }
}
