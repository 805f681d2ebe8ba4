//! Small guest programs on the recompiler, compared with the interpreter.

use cpum::CpuState;
use em::{Engine, Exit};
use iced_x86::code_asm::*;
use iem::testing::Machine;
use rem::Rem;
use vbox_types::VcpuId;

fn assemble(at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Runs the same long-mode program on both engines to HLT and gives both states.
fn both(code: &[u8]) -> (CpuState, CpuState) {
    let mut m = Machine::long(0x10_0000);
    m.tables();
    m.put(0x10_0000, code);
    let start = m.cpu.clone();
    let mut cpu = start.clone();
    let mut rem = Rem::new(m.board.ctx.clone(), VcpuId(0)).unwrap();
    let exit = rem.run(&mut cpu);
    assert!(matches!(exit, Exit::Halt), "{exit:?} at {:#x}", cpu.rip);
    let mut n = Machine::long(0x10_0000);
    n.tables();
    n.put(0x10_0000, code);
    n.cpu = start;
    let exit = n.run();
    assert!(matches!(exit, Exit::Halt), "{exit:?} at {:#x}", n.cpu.rip);
    let mut a = vec![0; 4 << 20];
    let mut b = vec![0; 4 << 20];
    m.board.ram.read(0, &mut a);
    n.board.ram.read(0, &mut b);
    if let Some(at) = a.iter().zip(&b).position(|(a, b)| a != b) {
        panic!("memory differs at {at:#x}");
    }
    (cpu, n.cpu)
}

fn agree(code: &[u8]) -> CpuState {
    let (a, b) = both(code);
    assert_eq!(a.gpr, b.gpr);
    assert_eq!(a.rip, b.rip);
    assert_eq!(a.rflags, b.rflags, "{:#x} {:#x}", a.rflags, b.rflags);
    a
}

#[test]
fn a_loop_counts() {
    let code = assemble(0x10_0000, |a| {
        let mut top = a.create_label();
        a.mov(rcx, 1000u64)?;
        a.xor(eax, eax)?;
        a.set_label(&mut top)?;
        a.add(rax, rcx)?;
        a.add(r13, rax)?;
        a.mov(r12, qword_ptr(0x20_0000u64))?;
        a.lea(r14, qword_ptr(r13 + rax * 2 + 5))?;
        a.mov(qword_ptr(0x20_0000u64), r14)?;
        a.dec(rcx)?;
        a.jne(top)?;
        a.hlt()
    });
    assert_eq!(agree(&code).gpr[0], 500_500);
}

#[test]
fn real_mode_code_runs_natively_in_segments() {
    let mut a = CodeAssembler::new(16).unwrap();
    let (mut row, mut column, mut add) = (a.create_label(), a.create_label(), a.create_label());
    let mut start = a.create_label();
    (|| {
        a.jmp(start)?;
        // Adds what DS:SI points to to a word at ES:DI.
        a.set_label(&mut add)?;
        a.push(bx)?;
        a.mov(bx, word_ptr(si))?;
        a.add(word_ptr(di).es(), bx)?;
        a.lea(si, word_ptr(si + 2))?;
        a.pop(bx)?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.mov(ax, 0x3000)?;
        a.mov(es, ax)?;
        a.mov(dx, 200)?;
        a.set_label(&mut row)?;
        // Each row lies in a segment of its own, and begins where offsets wrap.
        a.mov(ax, dx)?;
        a.add(ax, 0x1000)?;
        a.mov(ds, ax)?;
        a.mov(si, 0xfffe)?;
        a.mov(di, dx)?;
        a.add(di, di)?;
        a.mov(cx, 50)?;
        a.set_label(&mut column)?;
        a.call(add)?;
        a.loop_(column)?;
        a.dec(dx)?;
        a.jne(row)?;
        a.hlt()
    })()
    .unwrap();
    let code = a.assemble(0x7c00).unwrap();
    let prepare = |m: &mut Machine| {
        m.put(0x7c00, &code);
        let words: Vec<u8> = (0..0x2_0000u32).map(|n| (n * 7 + n / 256) as u8).collect();
        m.put(0x1_0000, &words);
    };
    let mut m = Machine::real(0x7c00);
    prepare(&mut m);
    let mut cpu = m.cpu.clone();
    let mut rem = Rem::new(m.board.ctx.clone(), VcpuId(0)).unwrap();
    let exit = rem.run(&mut cpu);
    assert!(matches!(exit, Exit::Halt), "{exit:?} at {:#x}", cpu.rip);
    let mut n = Machine::real(0x7c00);
    prepare(&mut n);
    n.run_to_halt();
    assert_eq!((cpu.gpr, cpu.rip, cpu.rflags), (n.cpu.gpr, n.cpu.rip, n.cpu.rflags));
    assert_eq!(cpu.seg[3].base, n.cpu.seg[3].base);
    assert_eq!(m.bytes::<0x200>(0x3_0000), n.bytes::<0x200>(0x3_0000));
    assert_ne!(m.u16_at(0x3_0002), 0);
    // Ten thousand calls, of which none leaves generated code once that is linked.
    let count = |name| rem.statistics().iter().find(|s| s.0 == name).unwrap().1;
    assert!(count("native entries") < 200, "{}", count("native entries"));
    assert!(count("instructions interpreted from native code") < 20);
}

#[test]
fn calls_return() {
    let code = assemble(0x10_0000, |a| {
        let mut fib = a.create_label();
        let mut base = a.create_label();
        let mut start = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut fib)?;
        a.cmp(rdi, 2)?;
        a.jb(base)?;
        a.push(rbx)?;
        a.push(r12)?;
        a.mov(rbx, rdi)?;
        a.lea(rdi, qword_ptr(rbx - 1))?;
        a.call(fib)?;
        a.mov(r12, rax)?;
        a.lea(rdi, qword_ptr(rbx - 2))?;
        a.call(fib)?;
        a.add(rax, r12)?;
        a.pop(r12)?;
        a.pop(rbx)?;
        a.ret()?;
        a.set_label(&mut base)?;
        a.mov(rax, rdi)?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.mov(rsp, 0x30_0000u64)?;
        a.mov(edi, 15)?;
        a.call(fib)?;
        a.hlt()
    });
    assert_eq!(agree(&code).gpr[0], 610);
}

#[test]
fn frames_across_a_page_boundary_work() {
    let code = assemble(0x10_0000, |a| {
        let mut top = a.create_label();
        let mut f = a.create_label();
        let mut start = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut f)?;
        a.push(rbx)?;
        a.push(rcx)?;
        a.sub(rsp, 0x18)?;
        a.mov(qword_ptr(rsp + 8), rcx)?;
        a.add(qword_ptr(rsp + 8), 3)?;
        a.mov(rbx, qword_ptr(rsp + 8))?;
        a.add(rax, rbx)?;
        a.add(rsp, 0x18)?;
        a.pop(rcx)?;
        a.pop(rbx)?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.xor(eax, eax)?;
        a.mov(ecx, 300)?;
        a.mov(rsp, 0x30_0010u64)?;
        a.set_label(&mut top)?;
        a.lea(rsp, qword_ptr(rsp - 4))?;
        a.call(f)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    agree(&code);
}

#[test]
fn code_that_changes_itself_runs_as_changed() {
    let code = assemble(0x10_0000, |a| {
        let mut top = a.create_label();
        let mut patch = a.create_label();
        a.mov(ecx, 50)?;
        a.xor(eax, eax)?;
        a.set_label(&mut top)?;
        a.lea(rbx, qword_ptr(patch))?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.set_label(&mut patch)?;
        a.mov(edx, 0x11223344)?;
        a.add(rax, rdx)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    assert_eq!(agree(&code).gpr[0], 50 * 51 / 2);
}

#[test]
fn a_division_by_zero_is_the_guests() {
    let code = assemble(0x10_0000, |a| {
        a.mov(ecx, 3)?;
        a.mov(eax, 100)?;
        a.xor(edx, edx)?;
        a.div(ecx)?;
        a.xor(ecx, ecx)?;
        a.div(ecx)?;
        a.hlt()
    });
    let (a, b) = both(&code);
    assert_eq!(a.gpr, b.gpr);
    assert_eq!(a.rip, b.rip);
}

#[test]
fn flags_survive_memory_accesses() {
    let code = assemble(0x10_0000, |a| {
        let mut top = a.create_label();
        let mut skip = a.create_label();
        a.mov(ecx, 200)?;
        a.mov(rsi, 0x20_0000u64)?;
        a.mov(r15, 0x12345u64)?;
        a.set_label(&mut top)?;
        a.imul_3(r15, r15, 0x1003)?;
        a.cmp(r15, 0x5000)?;
        a.mov(qword_ptr(rsi), r15)?;
        a.mov(rdx, qword_ptr(rsi))?;
        a.jl(skip)?;
        a.adc(qword_ptr(rsi + 8), rdx)?;
        a.set_label(&mut skip)?;
        a.setp(byte_ptr(rsi + 16))?;
        a.adc(rax, rdx)?;
        a.inc(qword_ptr(rsi + 24))?;
        a.adc(rbx, 0)?;
        a.lea(rsi, qword_ptr(rsi + 8))?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    agree(&code);
}

#[test]
fn flags_survive_up_to_a_call_of_the_hypervisor() {
    // There is none: the handler of #UD halts, with the flags in its frame.
    let code = assemble(0x10_0000, |a| {
        a.mov(rsi, 0x20_0000u64)?;
        a.mov(edx, 1)?;
        a.cmp(byte_ptr(rsi), 0)?;
        for n in 0..4 {
            a.mov(dword_ptr(rsi + 0x1001 * n), edx)?;
        }
        a.vmcall()?;
        a.hlt()
    });
    agree(&code);
}

#[test]
fn vectors_and_x87_pass_through() {
    let code = assemble(0x10_0000, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 100)?;
        a.mov(rsi, 0x20_0000u64)?;
        a.mov(qword_ptr(rsi), 3)?;
        a.fninit()?;
        a.fld1()?;
        a.set_label(&mut top)?;
        a.cvtsi2sd(xmm1, qword_ptr(rsi))?;
        a.addsd(xmm0, xmm1)?;
        a.movupd(xmmword_ptr(rsi + 16), xmm0)?;
        a.movapd(xmm2, xmmword_ptr(rsi + 16))?;
        a.paddq(xmm3, xmm2)?;
        a.fild(qword_ptr(rsi))?;
        a.faddp(st1, st0)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.fstp(qword_ptr(rsi + 64))?;
        a.movq(rax, xmm0)?;
        a.movq(rbx, xmm3)?;
        a.hlt()
    });
    agree(&code);
}

#[test]
fn flags_survive_a_jump_whose_slot_belongs_to_another_block() {
    // Two blocks 64 KiB apart share a slot of the jump cache; only the second one reads flags.
    let main = assemble(0x10_0000, |a| {
        let (mut top, mut first, mut second) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 100)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut top)?;
        a.lea(r11, qword_ptr(first))?;
        a.mov(r10d, 0x11_0040)?;
        a.jmp(r10)?;
        a.set_label(&mut first)?;
        a.stc()?;
        a.lea(r11, qword_ptr(second))?;
        a.mov(r10d, 0x12_0040)?;
        a.jmp(r10)?;
        a.set_label(&mut second)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    let plain = assemble(0x11_0040, |a| {
        a.xor(eax, eax)?;
        a.jmp(r11)
    });
    let reads = assemble(0x12_0040, |a| {
        a.adc(rbx, 0)?;
        a.jmp(r11)
    });
    let mut code = vec![0x90; 0x2_0100];
    for (at, part) in [(0, main), (0x1_0040, plain), (0x2_0040, reads)] {
        code[at..at + part.len()].copy_from_slice(&part);
    }
    assert_eq!(agree(&code).gpr[3], 100);
}

#[test]
fn instructions_across_pages_run_in_loops() {
    for shift in 1..40 {
        let code = assemble(0x10_0000, |a| {
            let mut top = a.create_label();
            let mut start = a.create_label();
            a.jmp(start)?;
            for _ in 0..(0x1000 - 5 - 20 - shift) {
                a.nop()?;
            }
            a.set_label(&mut start)?;
            a.mov(ecx, 100)?;
            a.xor(eax, eax)?;
            a.mov(rbx, 0x20_0000u64)?;
            a.set_label(&mut top)?;
            a.add(qword_ptr(rbx + 0x100), 0x1234567)?;
            a.add(rax, qword_ptr(rbx + 0x100))?;
            a.cmp(rax, 0x7654321)?;
            a.adc(rdx, 0x1234567)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        });
        agree(&code);
    }
}
