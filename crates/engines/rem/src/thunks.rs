//! The ways between Rust and generated code.
//!
//! In generated code the guest's general registers are in the host's own, except RSP (in r12) and r12 to r15 (in the context);
//! the arithmetic flags are in RFLAGS; x87, MMX, SSE and AVX state is in the unit. Thunks move all but the x87 state to
//! [`CpuState`] and the context and back.

use std::mem::offset_of;

use cpum::CpuState;
use iced_x86::code_asm::*;

use iem::tlb::{ENTRIES, Entry};

use crate::context::{TLB_AT, TLB_MASK, TLB_SHIFT, off};
use crate::slow;

/// Addresses of the thunks in the code buffer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Thunks {
    /// `extern "sysv64" fn()`: loads the guest's state and goes to `Context::entry`; gives the reason of the exit in rax.
    pub(crate) enter: u64,
    /// Leaves at page offset r14d for reason r13d.
    pub(crate) exit: u64,
    /// Leaves at linear address r15 because the jump cache does not know it. Flags are in the context.
    pub(crate) unknown: u64,
    /// Called for an access at r15 as r14d describes, with dead flags or flags in the context. Returns to try again, or five bytes
    /// further on with the host address in r15 and its distance from the linear one in r14.
    pub(crate) slow_dead: u64,
    pub(crate) slow_saved: u64,
    /// Where a host exception at an instruction is continued: leaves to have the instruction interpreted.
    pub(crate) host_fault: u64,
    /// Called for MOVS and STOS by bank, [`StringForm`] and element size. The instruction's page offset is in
    /// `Context::fault_offset`; where the interpreter must go on, they leave for that.
    pub(crate) strings: [[[u64; 4]; STRING_FORMS]; 3],
}

/// How a string instruction moves.
#[derive(Clone, Copy)]
pub(crate) struct StringForm {
    /// STOS.
    pub(crate) stos: bool,
    /// Without REP.
    pub(crate) once: bool,
    /// With addresses and a count of 32 bits.
    pub(crate) narrow: bool,
}

const STRING_FORMS: usize = 8;

impl StringForm {
    pub(crate) fn number(self) -> usize {
        usize::from(self.stos) | usize::from(self.once) << 1 | usize::from(self.narrow) << 2
    }

    fn of(number: usize) -> Self {
        Self { stos: number & 1 != 0, once: number & 2 != 0, narrow: number & 4 != 0 }
    }
}

/// Why generated code was left, in the low three bits of what `enter` returns.
pub(crate) mod reason {
    /// Go on at RIP.
    pub(crate) const GO_ON: u64 = 0;
    /// The instruction at RIP must be interpreted.
    pub(crate) const INTERPRET: u64 = 1;
    /// The same, and it works on x87, SSE or AVX state.
    pub(crate) const INTERPRET_FP: u64 = 2;
    /// Go on at RIP; the link in the upper bits can be aimed at the code there.
    pub(crate) const LINK: u64 = 3;
    /// Go on at RIP, which the jump cache did not know.
    pub(crate) const UNKNOWN: u64 = 4;
    /// Go on at RIP; the block there, whose number is in the upper bits, is not of the bytes that stand there now.
    pub(crate) const STALE: u64 = 5;
    /// Go on at RIP; the page of the block whose number is in the upper bits has not changed for long.
    pub(crate) const SETTLED: u64 = 6;
}

const GPR: usize = offset_of!(CpuState, gpr);
const RIP: usize = offset_of!(CpuState, rip);
const RFLAGS: usize = offset_of!(CpuState, rflags);
const ARITH: i32 = 0x8d5;

fn ctx(offset: i32) -> AsmMemoryOperand {
    qword_ptr(offset as u64).gs()
}

/// The guest registers that are in host registers, with their numbers.
const HOMED: [(usize, AsmRegister64); 13] = [
    (0, rax),
    (1, rcx),
    (2, rdx),
    (3, rbx),
    (4, r12),
    (5, rbp),
    (6, rsi),
    (7, rdi),
    (8, r8),
    (9, r9),
    (10, r10),
    (11, r11),
    (16, r13),
];

const XMM: [AsmRegisterXmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];
const YMM: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];

fn vector_slot(i: usize) -> u64 {
    (off::VECTORS + 32 * i as i32) as u64
}

fn spill_vectors(a: &mut CodeAssembler, avx: bool) -> Result<(), IcedError> {
    for i in 0..16 {
        if avx {
            a.vmovaps(ymmword_ptr(vector_slot(i)).gs(), YMM[i])?;
        } else {
            a.movaps(xmmword_ptr(vector_slot(i)).gs(), XMM[i])?;
        }
    }
    if avx {
        a.vzeroupper()?;
    }
    Ok(())
}

fn load_vectors(a: &mut CodeAssembler, avx: bool) -> Result<(), IcedError> {
    for i in 0..16 {
        if avx {
            a.vmovaps(YMM[i], ymmword_ptr(vector_slot(i)).gs())?;
        } else {
            a.movaps(XMM[i], xmmword_ptr(vector_slot(i)).gs())?;
        }
    }
    Ok(())
}

/// Stores the general registers to the CPU state at r15, including those that the context holds; keeps r13, r14 and flags.
fn store_registers(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (n, register) in HOMED {
        if n < 16 {
            a.mov(qword_ptr(r15 + (GPR + 8 * n)), register)?;
        }
    }
    for n in 0..4 {
        a.mov(rcx, ctx(off::HIGH + 8 * n))?;
        a.mov(qword_ptr(r15 + (GPR + 8 * (12 + n as usize))), rcx)?;
    }
    Ok(())
}

/// Loads the general registers from the CPU state at r15; uses r14 before.
fn load_registers(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for n in 0..4 {
        a.mov(r14, qword_ptr(r15 + (GPR + 8 * (12 + n as usize))))?;
        a.mov(ctx(off::HIGH + 8 * n), r14)?;
    }
    a.mov(r13, ctx(off::DELTA))?;
    for (n, register) in HOMED {
        if n < 16 {
            a.mov(register, qword_ptr(r15 + (GPR + 8 * n)))?;
        }
    }
    Ok(())
}

/// Puts the flags in ax (as LAHF and SETO give them) into the CPU state at r15; uses rax and rcx.
fn merge_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.movzx(ecx, ah)?;
    a.movzx(eax, al)?;
    a.and(ecx, ARITH & 0xff)?;
    a.shl(eax, 11)?;
    a.or(ecx, eax)?;
    a.mov(rax, qword_ptr(r15 + RFLAGS))?;
    a.and(rax, !ARITH)?;
    a.or(rax, rcx)?;
    a.mov(qword_ptr(r15 + RFLAGS), rax)
}

/// Returns from `enter`; the reason is in rax.
fn leave(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rsp, ctx(off::HOST_RSP))?;
    a.add(rsp, 8)?;
    for register in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(register)?;
    }
    a.ret()
}

/// MOVS or STOS: the host's own instruction, on each stretch that lies in one page at both ends if it is repeated.
fn string(
    a: &mut CodeAssembler,
    bank: usize,
    form: StringForm,
    shift: u32,
    exit: CodeLabel,
    slow_saved: CodeLabel,
) -> Result<(), IcedError> {
    let StringForm { stos, once, narrow } = form;
    let tlb = TLB_AT + (bank * ENTRIES * size_of::<Entry>()) as i32;
    let entry = |field: usize| qword_ptr(r14 + (tlb + field as i32)).gs();
    let read = offset_of!(Entry, read);
    let write = offset_of!(Entry, write);
    let delta = offset_of!(Entry, delta);
    let size = 1 << shift;
    let mut again = a.create_label();
    let mut done = a.create_label();
    let mut fail = a.create_label();
    let mut destination = a.create_label();
    let miss_write = a.create_label();
    let miss_read = a.create_label();
    // The guest's pointer as an address.
    let take =
        |a: &mut CodeAssembler, to: (AsmRegister64, AsmRegister32), source: bool| match (narrow, source) {
            (false, true) => a.mov(to.0, rsi),
            (false, false) => a.mov(to.0, rdi),
            (true, true) => a.mov(to.1, esi),
            (true, false) => a.mov(to.1, edi),
        };
    a.mov(r14, rax)?;
    a.lahf()?;
    a.seto(al)?;
    a.mov(word_ptr(off::FLAGS as u64).gs(), ax)?;
    a.mov(rax, r14)?;
    a.mov(r15, ctx(off::CPU))?;
    a.test(byte_ptr(r15 + (RFLAGS + 1)), 4)?;
    a.jne(fail)?;
    if !(once && stos) {
        a.set_label(&mut again)?;
    }
    if !once {
        if narrow {
            a.test(ecx, ecx)?;
        } else {
            a.test(rcx, rcx)?;
        }
        a.je(done)?;
    }
    // The source comes first, as far as faults go.
    if !stos {
        a.mov(r14d, esi)?;
        a.shr(r14d, u32::from(TLB_SHIFT))?;
        a.and(r14d, TLB_MASK)?;
        take(a, (r15, r15d), true)?;
        a.xor(r15, entry(read))?;
        a.cmp(r15, 0xfff)?;
        a.ja(miss_read)?;
        take(a, (r15, r15d), true)?;
        a.add(r15, entry(delta))?;
        a.mov(ctx(off::TMP + 16), r15)?;
    }
    // What was found of the source is kept while the destination is looked up: both may have the same entry of the TLB.
    a.set_label(&mut destination)?;
    if !stos {
        a.mov(r13d, esi)?;
        a.or(r13d, !0xfff)?;
        a.neg(r13d)?;
    }
    a.mov(r14d, edi)?;
    a.shr(r14d, u32::from(TLB_SHIFT))?;
    a.and(r14d, TLB_MASK)?;
    take(a, (r15, r15d), false)?;
    a.xor(r15, entry(write))?;
    a.cmp(r15, 0xfff)?;
    a.ja(miss_write)?;
    a.mov(ctx(off::TMP), r15)?;
    take(a, (r15, r15d), false)?;
    a.add(r15, entry(delta))?;
    a.mov(r14d, 0x1000)?;
    a.sub(r14d, dword_ptr(off::TMP as u64).gs())?;
    if stos {
        a.mov(r13d, r14d)?;
    } else {
        a.cmp(r14d, r13d)?;
        a.cmovb(r13d, r14d)?;
    }
    // Elements in this stretch; none if one reaches into the next page.
    if shift > 0 {
        a.shr(r13d, shift)?;
        a.je(fail)?;
    }
    if once {
        a.mov(r13d, 1)?;
    } else {
        if narrow {
            a.mov(r14d, ecx)?;
        } else {
            a.mov(r14, rcx)?;
        }
        a.cmp(r14, r13)?;
        a.cmovb(r13, r14)?;
        a.mov(ctx(off::TMP), r14)?;
        a.mov(rcx, r13)?;
    }
    a.mov(ctx(off::TMP + 24), rdi)?;
    a.mov(r14, rsi)?;
    a.mov(rdi, r15)?;
    if !stos {
        a.mov(rsi, ctx(off::TMP + 16))?;
    }
    let host = if once { &mut *a } else { a.rep() };
    match (stos, shift) {
        (true, 0) => host.stosb()?,
        (true, 1) => host.stosw()?,
        (true, 2) => host.stosd()?,
        (true, _) => host.stosq()?,
        (false, 0) => host.movsb()?,
        (false, 1) => host.movsw()?,
        (false, 2) => host.movsd()?,
        (false, _) => host.movsq()?,
    }
    a.mov(rdi, ctx(off::TMP + 24))?;
    if narrow {
        a.lea(edi, dword_ptr(rdi + r13 * size))?;
    } else {
        a.lea(rdi, qword_ptr(rdi + r13 * size))?;
    }
    if !stos && narrow {
        a.lea(esi, dword_ptr(r14 + r13 * size))?;
    } else if !stos {
        a.lea(rsi, qword_ptr(r14 + r13 * size))?;
    }
    if once {
        a.jmp(done)?;
    } else {
        a.mov(rcx, ctx(off::TMP))?;
        a.sub(rcx, r13)?;
        a.je(done)?;
        a.mov(r14, ctx(off::KICK))?;
        a.cmp(dword_ptr(r14), 0)?;
        a.je(again)?;
    }
    a.set_label(&mut fail)?;
    restore_flags(a)?;
    a.lea(rsp, qword_ptr(rsp + 8))?;
    a.mov(r14d, dword_ptr(off::FAULT_OFFSET as u64).gs())?;
    a.mov(r13d, reason::INTERPRET as u32)?;
    a.jmp(exit)?;
    // Pages that the TLB does not know are looked up as for any other access.
    for (mut label, writes) in [(miss_write, true), (miss_read, false)] {
        if stos && !writes {
            continue;
        }
        a.set_label(&mut label)?;
        take(a, (r15, r15d), !writes)?;
        a.mov(r14d, dword_ptr(off::FAULT_OFFSET as u64).gs())?;
        a.or(r14d, slow::describe(0, 1 << shift, 1, writes, false))?;
        a.lea(rsp, qword_ptr(rsp - 8))?;
        a.call(slow_saved)?;
        // Five bytes for "try again": r15 is zero.
        a.db(&[0x45, 0x31, 0xff, 0x66, 0x90])?;
        a.lea(rsp, qword_ptr(rsp + 8))?;
        a.test(r15, r15)?;
        a.je(if writes { destination } else { again })?;
        a.jmp(fail)?;
    }
    a.set_label(&mut done)?;
    restore_flags(a)?;
    a.mov(r13, ctx(off::DELTA))?;
    a.ret()
}

fn restore_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(r14, rax)?;
    a.movzx(eax, word_ptr(off::FLAGS as u64).gs())?;
    a.add(al, 127)?;
    a.sahf()?;
    a.mov(rax, r14)
}

/// Where a stack check (r15 and r14d as for a slow access) failed because another page was kept, keeps the one it asks for and
/// returns, if the TLB knows it and the accesses lie in it. Kernels have several stacks and change between them at each system call.
fn keep_stack_page(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let write = TLB_AT + offset_of!(Entry, write) as i32;
    let delta = TLB_AT + offset_of!(Entry, delta) as i32;
    let mut slow = a.create_label();
    let mut fail = a.create_label();
    a.mov(r13d, r14d)?;
    a.and(r13d, slow::STACK | slow::GROUP)?;
    a.cmp(r13d, slow::STACK)?;
    a.jne(slow)?;
    a.mov(ctx(off::TMP), r15)?;
    a.mov(ctx(off::TMP + 8), r14)?;
    a.shr(r14d, slow::SIZE_SHIFT)?;
    a.and(r14d, slow::SIZE_MASK)?;
    a.mov(r13d, r15d)?;
    a.and(r13d, 0xfff)?;
    a.add(r13d, r14d)?;
    a.cmp(r13d, 0x1000)?;
    a.ja(fail)?;
    a.mov(r13, ctx(off::BANK))?;
    a.shl(r13, (ENTRIES * size_of::<Entry>()).trailing_zeros())?;
    a.mov(r14d, r15d)?;
    a.shr(r14d, u32::from(TLB_SHIFT))?;
    a.and(r14d, TLB_MASK)?;
    a.add(r14, r13)?;
    a.and(r15, -0x1000)?;
    a.cmp(r15, qword_ptr(r14 + write).gs())?;
    a.jne(fail)?;
    a.mov(r13, qword_ptr(r14 + delta).gs())?;
    a.mov(ctx(off::STACK_PAGE), r15)?;
    a.mov(ctx(off::DELTA), r13)?;
    a.ret()?;
    a.set_label(&mut fail)?;
    a.mov(r15, ctx(off::TMP))?;
    a.mov(r14, ctx(off::TMP + 8))?;
    a.set_label(&mut slow)
}

/// Makes the thunks for a buffer at `base`; `access` is the function behind slow accesses.
pub(crate) fn build(base: u64, avx: bool, access: u64) -> Result<(Vec<u8>, Thunks), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut labels: [CodeLabel; 6] = std::array::from_fn(|_| CodeLabel::default());
    for label in &mut labels {
        *label = a.create_label();
    }
    let [mut enter, mut exit, mut unknown, mut slow_dead, mut slow_saved, mut host_fault] = labels;

    a.set_label(&mut enter)?;
    for register in [rbx, rbp, r12, r13, r14, r15] {
        a.push(register)?;
    }
    a.sub(rsp, 8)?;
    a.mov(ctx(off::HOST_RSP), rsp)?;
    a.mov(r15, ctx(off::CPU))?;
    load_vectors(&mut a, avx)?;
    a.mov(ecx, dword_ptr(r15 + RFLAGS))?;
    a.mov(eax, ecx)?;
    a.shl(eax, 8)?;
    a.shr(ecx, 11)?;
    a.and(ecx, 1)?;
    a.mov(al, cl)?;
    a.add(al, 127)?;
    a.sahf()?;
    load_registers(&mut a)?;
    a.jmp(ctx(off::ENTRY))?;

    a.set_label(&mut host_fault)?;
    let mut plain = a.create_label();
    a.mov(r14d, dword_ptr(off::FAULT_OFFSET as u64).gs())?;
    a.mov(r13d, reason::INTERPRET as u32)?;
    a.mov(r15, rcx)?;
    a.mov(rcx, ctx(off::MASKED))?;
    a.jrcxz(plain)?;
    a.mov(ctx(off::MASKED), 0)?;
    a.mov(rax, ctx(off::TMP + 16))?;
    a.mov(rdx, ctx(off::TMP + 24))?;
    a.mov(r13d, reason::INTERPRET_FP as u32)?;
    a.set_label(&mut plain)?;
    a.mov(rcx, r15)?;
    a.set_label(&mut exit)?;
    a.mov(r15, ctx(off::PAGE))?;
    a.lea(r15, qword_ptr(r15 + r14))?;
    let mut with_rip = a.create_label();
    a.set_label(&mut with_rip)?;
    a.mov(ctx(off::TMP), r15)?;
    a.mov(r15, ctx(off::CPU))?;
    store_registers(&mut a)?;
    a.lahf()?;
    a.seto(al)?;
    merge_flags(&mut a)?;
    a.mov(rax, ctx(off::TMP))?;
    a.mov(qword_ptr(r15 + RIP), rax)?;
    spill_vectors(&mut a, avx)?;
    a.mov(eax, r13d)?;
    leave(&mut a)?;

    a.set_label(&mut unknown)?;
    restore_flags(&mut a)?;
    a.mov(r13d, reason::UNKNOWN as u32)?;
    a.jmp(with_rip)?;

    let mut common = a.create_label();
    a.set_label(&mut slow_saved)?;
    keep_stack_page(&mut a)?;
    a.mov(ctx(off::TMP), r15)?;
    a.mov(ctx(off::TMP + 8), r14)?;
    a.mov(r15, ctx(off::CPU))?;
    store_registers(&mut a)?;
    a.movzx(eax, word_ptr(off::FLAGS as u64).gs())?;
    merge_flags(&mut a)?;
    a.jmp(common)?;
    a.set_label(&mut slow_dead)?;
    keep_stack_page(&mut a)?;
    a.mov(ctx(off::TMP), r15)?;
    a.mov(ctx(off::TMP + 8), r14)?;
    a.mov(r15, ctx(off::CPU))?;
    store_registers(&mut a)?;
    a.set_label(&mut common)?;
    a.mov(eax, r14d)?;
    a.and(eax, 0xfff)?;
    a.add(rax, ctx(off::PAGE))?;
    a.mov(qword_ptr(r15 + RIP), rax)?;
    spill_vectors(&mut a, avx)?;
    a.mov(rdi, ctx(off::REM))?;
    a.mov(rsi, ctx(off::TMP))?;
    a.mov(edx, dword_ptr((off::TMP + 8) as u64).gs())?;
    a.sub(rsp, 8)?;
    a.mov(rax, access)?;
    a.call(rax)?;
    a.add(rsp, 8)?;
    let mut abort = a.create_label();
    let mut direct = a.create_label();
    a.mov(r15, ctx(off::CPU))?;
    a.cmp(rax, slow::LEAVE as i32)?;
    a.ja(direct)?;
    a.test(eax, eax)?;
    a.jne(abort)?;
    load_vectors(&mut a, avx)?;
    load_registers(&mut a)?;
    a.ret()?;
    a.set_label(&mut direct)?;
    a.mov(rcx, rax)?;
    a.sub(rcx, ctx(off::TMP))?;
    a.mov(ctx(off::TMP + 8), rcx)?;
    a.mov(ctx(off::TMP), rax)?;
    a.add(qword_ptr(rsp), 5)?;
    load_vectors(&mut a, avx)?;
    load_registers(&mut a)?;
    a.mov(r15, ctx(off::TMP))?;
    a.mov(r14, ctx(off::TMP + 8))?;
    a.ret()?;
    a.set_label(&mut abort)?;
    let mut interpret = a.create_label();
    a.cmp(eax, slow::LEAVE as i32)?;
    a.jne(interpret)?;
    a.mov(eax, reason::GO_ON as u32)?;
    leave(&mut a)?;
    a.set_label(&mut interpret)?;
    a.mov(eax, dword_ptr((off::TMP + 8) as u64).gs())?;
    a.shr(eax, slow::FP_SHIFT)?;
    a.and(eax, 1)?;
    a.add(eax, reason::INTERPRET as u32)?;
    leave(&mut a)?;

    let mut strings: [[[CodeLabel; 4]; STRING_FORMS]; 3] = Default::default();
    for (bank, forms) in strings.iter_mut().enumerate() {
        for (form, sizes) in forms.iter_mut().enumerate() {
            for (shift, label) in sizes.iter_mut().enumerate() {
                *label = a.create_label();
                a.set_label(label)?;
                string(&mut a, bank, StringForm::of(form), shift as u32, exit, slow_saved)?;
            }
        }
    }

    let done = a.assemble_options(base, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let thunks = Thunks {
        enter: done.label_ip(&enter)?,
        exit: done.label_ip(&exit)?,
        unknown: done.label_ip(&unknown)?,
        slow_dead: done.label_ip(&slow_dead)?,
        slow_saved: done.label_ip(&slow_saved)?,
        host_fault: done.label_ip(&host_fault)?,
        strings: {
            let mut all = [[[0; 4]; STRING_FORMS]; 3];
            for (bank, forms) in strings.iter().enumerate() {
                for (form, sizes) in forms.iter().enumerate() {
                    for (shift, label) in sizes.iter().enumerate() {
                        all[bank][form][shift] = done.label_ip(label)?;
                    }
                }
            }
            all
        },
    };
    Ok((done.inner.code_buffer, thunks))
}
