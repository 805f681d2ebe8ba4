//! Single step and the debug registers.

use cpum::state::rflags;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use iem::testing::*;

const CODE: u64 = 0x2_0000;

fn long(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::long(CODE);
    m.tables();
    let mut a = CodeAssembler::new(64).unwrap();
    code(&mut a).unwrap();
    let bytes = a.assemble(CODE).unwrap();
    m.put(CODE, &bytes);
    m
}

#[test]
fn single_step_traps_behind_each_instruction() {
    let mut m = long(|a| {
        a.nop()?;
        a.mov(eax, 1)?;
        a.mov(eax, 2)
    });
    m.cpu.rflags |= rflags::TF;
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.u64_at(m.cpu.gpr[4])), (1, CODE + 1));
    assert_ne!(m.cpu.dr6 & 1 << 14, 0);
    assert_eq!(m.cpu.rflags & rflags::TF, 0);
    assert_ne!(m.u64_at(m.cpu.gpr[4] + 16) & rflags::TF, 0);
}

#[test]
fn popf_that_sets_tf_traps_behind_the_next_instruction() {
    let mut m = long(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.mov(eax, 1)?;
        a.mov(eax, 2)
    });
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[0]), (1, 1));
}

#[test]
fn a_repeated_string_instruction_traps_at_each_iteration() {
    let mut m = long(|a| {
        a.mov(ecx, 5)?;
        a.mov(rdi, 0x10_0000u64)?;
        a.rep().stosb()
    });
    m.cpu.rip = CODE;
    m.run(); // runs off the end; only to have the code decoded
    let mut m = long(|a| a.rep().stosb());
    m.cpu.gpr[1] = 5;
    m.cpu.gpr[7] = 0x10_0000;
    m.cpu.rflags |= rflags::TF;
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[1]), (1, 4));
    assert_eq!(m.u64_at(m.cpu.gpr[4]), CODE);
}

#[test]
fn instruction_breakpoints_fault_before_and_rf_passes_them() {
    let mut m = long(|a| {
        a.mov(eax, 1)?;
        a.mov(eax, 2)?;
        a.hlt()
    });
    m.cpu.dr[0] = CODE + 5;
    m.cpu.dr7 |= 2;
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[0], m.cpu.dr6 & 0xf), (1, 1, 1));
    assert_eq!(m.u64_at(m.cpu.gpr[4]), CODE + 5);
    m.cpu.rip = CODE + 5;
    m.cpu.rflags |= rflags::RF;
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[0], m.cpu.rip), (2, CODE + 11));
    assert_eq!(m.cpu.rflags & rflags::RF, 0);
}

#[test]
fn data_breakpoints_trap_behind_the_access() {
    let mut m = long(|a| {
        a.mov(rdi, 0x10_0000u64)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.mov(byte_ptr(rdi + 2), 1)?;
        a.hlt()
    });
    m.cpu.dr[1] = 0x10_0000;
    m.cpu.dr7 |= 1 << 3 | 1 << 20 | 3 << 22; // writes, four bytes
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.dr6 & 0xf), (1, 2));
    assert_eq!(m.u64_at(m.cpu.gpr[4]), CODE + 16);
    assert_eq!(m.bytes::<3>(0x10_0000), [0, 0, 1]);
}

#[test]
fn general_detect_guards_the_debug_registers() {
    let mut m = long(|a| a.mov(rax, dr0));
    m.cpu.dr7 |= 1 << 13;
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.dr6 & 1 << 13), (1, 1 << 13));
    assert_eq!(m.cpu.dr7 & 1 << 13, 0);
}

#[test]
fn alignment_checks_apply_to_user_mode_only() {
    let code = |a: &mut CodeAssembler| {
        a.mov(rdi, 0x10_0001u64)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.hlt()
    };
    let mut m = long(code);
    m.cpu.cr0 |= cpum::state::cr0::AM;
    m.cpu.rflags |= rflags::AC;
    m.run_to_halt();
    assert_eq!(m.cpu.rip, CODE + 13);
    let mut m = long(code);
    m.cpu.cr0 |= cpum::state::cr0::AM;
    m.drop_privilege(CODE, 0x9000);
    m.cpu.rflags |= rflags::AC;
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.u64_at(m.cpu.gpr[4])), (17, 0));
}
