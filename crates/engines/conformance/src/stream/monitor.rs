//! The guest's own code around the programs: fault handlers that record and go on with the next group, and the entry that
//! loads the next case's registers.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::mode::*;
use crate::board::LOG_PORT;

/// Arithmetic flags, TF, RF and AC: what a fault handler takes out of the image it returns to.
const SCRUBBED: u32 = 0x0000_08d5 | 0x100 | 0x1_0000 | 0x4_0000;
/// Offset of the general registers in the state block, behind the XSAVE image.
pub(super) const REGISTERS_AT: u64 = 0x400;
/// The exception with which the processor pushes an error code.
pub(super) fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// A vector after which the program goes on where the frame says.
fn is_trap(vector: u8) -> bool {
    matches!(vector, 1 | 3 | 4 | 0x80)
}

const DR6_CLEAR: u32 = 0xffff_0ff0;

/// Assembles the monitor for a mode, to stand at [`MONITOR`].
///
/// # Panics
/// If it does not assemble: a bug.
pub(super) fn assemble(mode: Mode) -> Vec<u8> {
    let built = match mode.monitor_bits() {
        16 => monitor16(),
        32 => monitor32(mode),
        _ => monitor64(mode),
    };
    built.expect("the monitor assembles")
}

/// Offsets of the entries behind the stubs, each with room for 0x400 bytes.
const COMMON: u64 = 0x1000;
const TRAP: u64 = 0x1400;
const ENTRY: u64 = 0x1800;

fn place(code: &mut Vec<u8>, at: u64, mut part: CodeAssembler, ip: u64) -> Result<(), IcedError> {
    let bytes = part.assemble(ip + at)?;
    let end = at as usize + bytes.len();
    if code.len() < end {
        code.resize(end, 0xf4);
    }
    code[at as usize..end].copy_from_slice(&bytes);
    Ok(())
}

/// The stubs; `ip` is the offset in CS of the monitor's first byte.
fn stubs(code: &mut Vec<u8>, bits: u32, ip: u64) -> Result<(), IcedError> {
    for vector in 0..=255u8 {
        let at = u64::from(vector) * 16;
        let mut a = CodeAssembler::new(bits)?;
        match vector {
            END => a.hlt()?,
            NEXT => a.jmp(ip + ENTRY)?,
            _ => {
                if bits != 16 && !has_error_code(vector) {
                    a.push(0)?;
                }
                a.push(i32::from(vector as i8))?;
                a.jmp(ip + if is_trap(vector) { TRAP } else { COMMON })?;
            }
        }
        place(code, at, a, ip)?;
    }
    Ok(())
}

fn monitor64(mode: Mode) -> Result<Vec<u8>, IcedError> {
    let linear = mode.linear();
    let ip = linear + MONITOR;
    let mut code = Vec::new();
    stubs(&mut code, 64, ip)?;
    for trap in [false, true] {
        let mut a = CodeAssembler::new(64)?;
        a.push(rax)?;
        a.push(rdx)?;
        a.push(rbx)?;
        // rbx, rdx, rax, vector, error, rip, cs, flags, rsp, ss.
        a.mov(edx, u32::from(LOG_PORT))?;
        for at in [24, 32, 40, 44, 48, 56, 64, 72] {
            a.mov(eax, dword_ptr(rsp + at))?;
            a.out(dx, eax)?;
        }
        a.mov(rax, cr2)?;
        a.out(dx, eax)?;
        if trap {
            a.mov(rax, dr6)?;
            a.out(dx, eax)?;
            a.mov(eax, DR6_CLEAR)?;
            a.mov(dr6, rax)?;
        } else {
            a.mov(rbx, linear + RESUME)?;
            a.mov(eax, dword_ptr(rbx))?;
            if mode.bits() == 64 {
                a.mov(rbx, linear & !0xffff_ffff)?;
                a.or(rax, rbx)?;
            }
            a.mov(qword_ptr(rsp + 40), rax)?;
            a.and(dword_ptr(rsp + 56), !SCRUBBED)?;
        }
        a.pop(rbx)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.add(rsp, 16)?;
        a.iretq()?;
        place(&mut code, if trap { TRAP } else { COMMON }, a, ip)?;
    }
    let mut a = CodeAssembler::new(64)?;
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)?;
    a.mov(rbx, linear + STATE)?;
    a.mov(eax, 7)?;
    a.xor(edx, edx)?;
    a.xrstor64(ptr(rbx))?;
    let data = i32::from(mode.segment(3).selector);
    a.mov(eax, data)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(eax, i32::from(mode.segment(4).selector))?;
    a.mov(fs, eax)?;
    a.mov(eax, i32::from(mode.segment(5).selector))?;
    a.mov(gs, eax)?;
    if mode.bits() == 64 {
        a.mov(rax, mode.segment(4).base)?;
        a.wrfsbase(rax)?;
        a.mov(rax, mode.segment(5).base)?;
        a.wrgsbase(rax)?;
    }
    a.lea(rsp, qword_ptr(rbx + REGISTERS_AT as i32))?;
    for register in [r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax] {
        a.pop(register)?;
    }
    a.iretq()?;
    place(&mut code, ENTRY, a, ip)?;
    Ok(code)
}

/// 32-bit fields of the state block, in order.
pub(super) const FIELDS: [&str; 16] = [
    "edi", "esi", "ebp", "ebx", "edx", "ecx", "eax", "esp", "eip", "cs", "eflags", "ss", "ds", "es", "fs",
    "gs",
];

fn monitor32(mode: Mode) -> Result<Vec<u8>, IcedError> {
    let linear = mode.linear();
    let ip = linear + MONITOR;
    let mut code = Vec::new();
    stubs(&mut code, 32, ip)?;
    for trap in [false, true] {
        let mut a = CodeAssembler::new(32)?;
        a.push(eax)?;
        a.push(edx)?;
        a.push(ds)?;
        // ds, edx, eax, vector, error, eip, cs, flags, and at privilege 3 esp, ss.
        a.mov(eax, u32::from(MONITOR_DATA))?;
        a.mov(ds, eax)?;
        a.mov(edx, u32::from(LOG_PORT))?;
        let frame: &[i32] = if mode.user() { &[12, 16, 20, 24, 28, 32, 36] } else { &[12, 16, 20, 24, 28] };
        for at in frame {
            a.mov(eax, dword_ptr(esp + *at))?;
            a.out(dx, eax)?;
        }
        a.mov(eax, cr2)?;
        a.out(dx, eax)?;
        if trap {
            a.mov(eax, dr6)?;
            a.out(dx, eax)?;
            a.mov(eax, DR6_CLEAR)?;
            a.mov(dr6, eax)?;
        } else {
            a.mov(eax, dword_ptr(linear + RESUME))?;
            a.mov(dword_ptr(esp + 20), eax)?;
            a.and(dword_ptr(esp + 28), !SCRUBBED)?;
        }
        a.pop(ds)?;
        a.pop(edx)?;
        a.pop(eax)?;
        a.add(esp, 8)?;
        a.iretd()?;
        place(&mut code, if trap { TRAP } else { COMMON }, a, ip)?;
    }
    let field = |name: &str| {
        let n = FIELDS.iter().position(|f| *f == name).unwrap_or(0) as u64;
        dword_ptr(linear + STATE + REGISTERS_AT + 4 * n).cs()
    };
    let half = |name: &str| {
        let n = FIELDS.iter().position(|f| *f == name).unwrap_or(0) as u64;
        word_ptr(linear + STATE + REGISTERS_AT + 4 * n).cs()
    };
    let mut a = CodeAssembler::new(32)?;
    if mode.paged() {
        a.mov(eax, cr3)?;
        a.mov(cr3, eax)?;
    }
    a.mov(eax, u32::from(MONITOR_DATA))?;
    a.mov(ds, eax)?;
    a.mov(eax, 7)?;
    a.xor(edx, edx)?;
    a.mov(ebx, (linear + STATE) as u32)?;
    a.xrstor(ptr(ebx))?;
    if mode.user() {
        a.mov(esp, (linear + STACK0) as u32)?;
        a.push(field("ss"))?;
        a.push(field("esp"))?;
    } else {
        a.mov(ss, half("ss"))?;
        a.mov(esp, field("esp"))?;
    }
    a.push(field("eflags"))?;
    a.push(field("cs"))?;
    a.push(field("eip"))?;
    a.mov(es, half("es"))?;
    a.mov(fs, half("fs"))?;
    a.mov(gs, half("gs"))?;
    for (register, name) in
        [(edi, "edi"), (esi, "esi"), (ebp, "ebp"), (ebx, "ebx"), (edx, "edx"), (ecx, "ecx"), (eax, "eax")]
    {
        a.mov(register, field(name))?;
    }
    a.mov(ds, half("ds"))?;
    a.iretd()?;
    place(&mut code, ENTRY, a, ip)?;
    Ok(code)
}

/// The monitor's segment in real mode starts at [`MONITOR`], the stack's at [`STACK`].
fn monitor16() -> Result<Vec<u8>, IcedError> {
    let mut code = Vec::new();
    stubs(&mut code, 16, 0)?;
    for trap in [false, true] {
        let mut a = CodeAssembler::new(16)?;
        a.push(eax)?;
        a.push(edx)?;
        a.push(ds)?;
        a.push(bp)?;
        a.mov(bp, sp)?;
        // bp, ds, edx, eax, vector, ip, cs, flags.
        a.mov(dx, i32::from(LOG_PORT))?;
        for at in [12, 14, 16, 18] {
            a.movzx(eax, word_ptr(bp + at))?;
            a.out(dx, eax)?;
        }
        if trap {
            a.mov(eax, dr6)?;
            a.out(dx, eax)?;
            a.mov(eax, DR6_CLEAR)?;
            a.mov(dr6, eax)?;
        } else {
            a.mov(ax, (STACK >> 4) as i32)?;
            a.mov(ds, ax)?;
            a.mov(ax, word_ptr(RESUME - STACK))?;
            a.mov(word_ptr(bp + 14), ax)?;
            a.and(word_ptr(bp + 18), i32::from(!(SCRUBBED as u16) as i16))?;
        }
        a.pop(bp)?;
        a.pop(ds)?;
        a.pop(edx)?;
        a.pop(eax)?;
        a.add(sp, 2)?;
        a.iret()?;
        place(&mut code, if trap { TRAP } else { COMMON }, a, 0)?;
    }
    let offset = |name: &str| {
        let n = FIELDS.iter().position(|f| *f == name).unwrap_or(0) as u64;
        STATE - MONITOR + REGISTERS_AT + 4 * n
    };
    let mut a = CodeAssembler::new(16)?;
    a.mov(eax, 7)?;
    a.xor(edx, edx)?;
    a.mov(bx, (STATE - MONITOR) as i32)?;
    a.xrstor(ptr(bx).cs())?;
    a.mov(ss, word_ptr(offset("ss")).cs())?;
    a.mov(esp, dword_ptr(offset("esp")).cs())?;
    for name in ["eflags", "cs", "eip"] {
        a.push(word_ptr(offset(name)).cs())?;
    }
    a.mov(es, word_ptr(offset("es")).cs())?;
    a.mov(fs, word_ptr(offset("fs")).cs())?;
    a.mov(gs, word_ptr(offset("gs")).cs())?;
    for (register, name) in
        [(edi, "edi"), (esi, "esi"), (ebp, "ebp"), (ebx, "ebx"), (edx, "edx"), (ecx, "ecx"), (eax, "eax")]
    {
        a.mov(register, dword_ptr(offset(name)).cs())?;
    }
    a.mov(ds, word_ptr(offset("ds")).cs())?;
    a.iret()?;
    place(&mut code, ENTRY, a, 0)?;
    Ok(code)
}
