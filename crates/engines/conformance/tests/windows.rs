//! Windows of a small program; the machine's example `boot_lockstep` has a whole system.

use conformance::Kind;
use conformance::windows::{Failure, Window, Windows};
use cpum::CpuidTable;
use cpum::cpuid::{Leaf, OutputRegister, bit};
use iced_x86::code_asm::*;
use iem::testing::Machine;

const CODE: u64 = 0x10_0000;

/// Many pieces of code, each with a loop and a call, some with vectors, ports, or an instruction of BMI1; again and again.
fn machine() -> Machine {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut build = || -> Result<Vec<u8>, IcedError> {
        let mut function = a.create_label();
        let mut start = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut function)?;
        a.push(rcx)?;
        a.lea(rax, qword_ptr(rax + rcx * 2 + 1))?;
        a.pop(rcx)?;
        a.ret()?;
        a.set_label(&mut start)?;
        for n in 0..40 {
            let mut top = a.create_label();
            a.mov(ecx, 10 + n)?;
            a.set_label(&mut top)?;
            a.call(function)?;
            a.add(qword_ptr(0x20_0000 + 0x208 * n as u64), rax)?;
            a.adc(rdx, 3)?;
            a.dec(ecx)?;
            a.jne(top)?;
            if n % 5 == 0 {
                a.in_(al, 0x80)?;
                a.out(0x80, al)?;
            }
            if n % 7 == 0 {
                a.movq(xmm1, rax)?;
                a.paddq(xmm2, xmm1)?;
                a.movups(xmmword_ptr(0x24_0000 + 0x40 * n as u64), xmm2)?;
            }
            if n == 29 {
                a.mov(esi, 0xff)?;
                a.andn(rdi, rsi, rax)?;
            }
            a.xor(rbx, rax)?;
            a.ror(rbx, 7)?;
        }
        a.jmp(start)?;
        a.assemble(CODE)
    };
    let code = build().unwrap();
    let mut machine = Machine::long(CODE);
    machine.tables();
    machine.put(CODE, &code);
    machine
}

/// Compares windows while the machine runs.
fn run(machine: &mut Machine, windows: &mut Windows) -> Result<Vec<Window>, Failure> {
    let mut all = Vec::new();
    for _ in 0..40 {
        assert!(machine.iem.run_counted(&mut machine.cpu, 777).is_none());
        all.push(windows.compare(&machine.cpu, 500)?);
    }
    Ok(all)
}

#[test]
fn an_engine_agrees_with_the_interpreter_on_every_window() {
    for &kind in Kind::ALL {
        let mut machine = machine();
        let mut windows = Windows::new(&machine.board.ctx, kind).unwrap();
        match run(&mut machine, &mut windows) {
            Ok(all) => {
                assert!(all.iter().all(|w| w.instructions >= 500 && w.pages > 0 && w.bits == 64), "{all:?}");
                assert!(all.iter().any(|w| w.accesses > 0));
            }
            Err(Failure::Endless) => panic!("{kind:?}: no end"),
            Err(Failure::Differs(text)) => panic!("{kind:?}: {text}"),
        }
    }
}

#[test]
fn a_difference_planted_in_the_copy_is_found_and_made_small() {
    let mut machine = machine();
    let mut cpuid: CpuidTable = machine.board.ctx.cpuid.clone();
    let hidden = bit::BMI1;
    assert!(cpuid.has(hidden) && hidden.register == OutputRegister::Ebx);
    for entry in &mut cpuid.entries {
        if entry.leaf == hidden.leaf && entry.subleaf == Some(hidden.subleaf) {
            entry.value = Leaf { ebx: entry.value.ebx & !(1 << hidden.bit), ..entry.value };
        }
    }
    let mut windows = Windows::with_cpuid(&machine.board.ctx, Kind::Recompiler, cpuid).unwrap();
    let Err(Failure::Differs(text)) = run(&mut machine, &mut windows) else { panic!("nothing was found") };
    let small = text.split("Made small").nth(1).unwrap_or_else(|| panic!("not made small: {text}"));
    assert!(small.contains("andn"), "{text}");
    assert!(small.lines().filter(|l| l.contains("0x10")).count() < 12, "{text}");
}
