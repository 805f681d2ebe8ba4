//! Exceptions, interrupts and privilege transitions.

use cpum::state::{cr0, cr4, rflags, seg};
use em::{Engine, Event, Exit};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use iem::testing::*;

fn assemble(bits: u32, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

const CODE: u64 = 0x2_0000;

fn long(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::long(CODE);
    m.tables();
    let bytes = assemble(64, CODE, code);
    m.put(CODE, &bytes);
    m
}

fn protected(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::protected(CODE as u32);
    m.tables();
    let bytes = assemble(32, CODE, code);
    m.put(CODE, &bytes);
    m
}

#[test]
fn a_divide_error_pushes_the_address_of_the_instruction() {
    let mut m = long(|a| {
        a.nop()?;
        a.xor(ecx, ecx)?;
        a.div(ecx)
    });
    m.cpu.rflags |= rflags::IF;
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 0);
    let top = m.cpu.gpr[4];
    assert_eq!(top, 0x9000 - 40);
    assert_eq!(m.u64_at(top), CODE + 3);
    assert_eq!(m.u64_at(top + 8), CODE0.into());
    // The image of a fault has RF set.
    assert_eq!(m.u64_at(top + 16) & (rflags::RF | rflags::IF), rflags::RF | rflags::IF);
    assert_eq!((m.u64_at(top + 24), m.u64_at(top + 32)), (0x9000, DATA0.into()));
    assert_eq!(m.cpu.rflags & rflags::IF, 0);
}

#[test]
fn an_undefined_instruction_has_no_error_code_and_gp_has_one() {
    let mut m = long(|a| a.ud2());
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[4]), (6, 0x9000 - 40));
    let mut m = long(|a| {
        a.mov(eax, 0x77)?;
        a.mov(ds, eax)
    });
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[4]), (13, 0x9000 - 48));
    m.cpu.gdtr.limit = 0x2f;
    let mut m = long(|a| {
        a.mov(eax, 0x1073)?;
        a.mov(ds, eax)
    });
    m.run_to_halt();
    assert_eq!(m.u64_at(m.cpu.gpr[4]), 0x1070);
}

#[test]
fn an_interrupt_from_user_mode_switches_the_stack_and_iret_comes_back() {
    let mut m = long(|_| Ok(()));
    let user = assemble(64, CODE, |a| {
        a.mov(eax, 1)?;
        a.int(0x80)?;
        a.mov(ebx, 2)?;
        a.ud2()
    });
    m.put(CODE, &user);
    let handler = assemble(64, HANDLERS + 0x800, |a| {
        a.inc(eax)?;
        a.iretq()
    });
    m.put(HANDLERS + 0x800, &handler);
    m.drop_privilege(CODE, 0x9000);
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 6);
    assert_eq!((m.cpu.gpr[0], m.cpu.gpr[3]), (2, 2));
    // The frame of #UD on the inner stack names user CS, RIP, SS and RSP.
    assert_eq!(m.u64_at(STACK0 - 40), CODE + 5 + 2 + 5);
    assert_eq!(m.u64_at(STACK0 - 32), CODE3.into());
    assert_eq!((m.u64_at(STACK0 - 16), m.u64_at(STACK0 - 8)), (0x9000, DATA3.into()));
    assert_eq!(m.cpu.cpl(), 0);
}

#[test]
fn interrupt_gates_of_lower_privilege_refuse_int_n_but_not_exceptions() {
    let mut m = long(|a| a.int(0x40));
    m.put(IDT + 16 * 0x40, &gate(CODE0, (HANDLERS + 0x400) as u32, 0x8e, 0).to_le_bytes());
    m.drop_privilege(CODE, 0x9000);
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 13);
    assert_eq!(m.u64_at(STACK0 - 48), 0x40 * 8 + 2);
    assert_eq!(m.u64_at(STACK0 - 40), CODE);
}

#[test]
fn an_interrupt_stack_is_used_even_without_change_of_privilege() {
    let mut m = long(|a| a.ud2());
    m.put(IDT + 16 * 6, &gate(CODE0, (HANDLERS + 0x60) as u32, 0x8e, 1).to_le_bytes());
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[4]), (6, IST1 - 40));
}

#[test]
fn a_fault_while_a_page_fault_is_delivered_is_a_double_fault_and_then_a_triple() {
    let mut m = long(|a| {
        a.mov(rax, 0x7fff_0000_0000u64)?;
        a.mov(ebx, dword_ptr(rax))
    });
    // The page-fault gate is not present.
    m.put(IDT + 16 * 14, &gate(CODE0, 0, 0x0e, 0).to_le_bytes());
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.u64_at(m.cpu.gpr[4])), (8, 0));
    assert_eq!(m.cpu.cr2, 0x7fff_0000_0000);
    let mut m = long(|a| a.ud2());
    m.cpu.idtr.limit = 0;
    assert!(matches!(m.run(), Exit::TripleFault));
    assert_eq!(m.cpu.activity, cpum::Activity::Shutdown);
}

#[test]
fn injected_interrupts_wake_a_halted_cpu_behind_hlt() {
    let mut m = long(|a| {
        a.sti()?;
        a.hlt()?;
        a.mov(eax, 7)?;
        a.hlt()
    });
    assert!(matches!(m.run(), Exit::Halt));
    assert_eq!(m.cpu.rip, CODE + 2);
    let handler = assemble(64, HANDLERS + 0x300, |a| a.iretq());
    m.put(HANDLERS + 0x300, &handler);
    m.iem.inject(&mut m.cpu, Event::Interrupt(0x30)).unwrap();
    assert_eq!((m.cpu.activity, m.cpu.rip), (cpum::Activity::Running, HANDLERS + 0x300));
    assert_eq!(m.u64_at(m.cpu.gpr[4]), CODE + 2);
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[0], m.cpu.rip), (7, CODE + 8));
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut m = long(|a| a.hlt());
    m.iem.inject(&mut m.cpu, Event::Nmi).unwrap();
    assert!(m.cpu.nmi_blocked);
    let handler = assemble(64, HANDLERS + 0x20, |a| a.iretq());
    m.put(HANDLERS + 0x20, &handler);
    m.run_to_halt();
    assert!(!m.cpu.nmi_blocked);
}

#[test]
fn syscall_and_sysret_change_privilege_and_flags() {
    let mut m = long(|a| {
        a.mov(ebx, 5)?;
        a.syscall()?;
        a.mov(edx, 9)?;
        a.ud2()
    });
    let kernel = assemble(64, 0x2_1000, |a| {
        a.mov(rsi, cr0)?;
        a.pushfq()?;
        a.pop(rdi)?;
        a.sysretq()
    });
    m.put(0x2_1000, &kernel);
    m.cpu.msr.lstar = 0x2_1000;
    // SYSRET's base: user data is 8 above, 64-bit user code 16 above; here code comes before data, so use another layout.
    m.put(GDT + 0x30, &descriptor(0, 0xfffff, 0xf3, 0xc).to_le_bytes());
    m.put(GDT + 0x38, &descriptor(0, 0xfffff, 0xfb, 0xa).to_le_bytes());
    m.cpu.msr.star = 0x28u64 << 48 | u64::from(CODE0) << 32;
    m.cpu.msr.sfmask = rflags::IF | rflags::DF;
    m.drop_privilege(CODE, 0x9000);
    m.cpu.rflags |= rflags::IF;
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 6);
    assert_eq!((m.cpu.gpr[3], m.cpu.gpr[2]), (5, 9));
    assert_eq!(m.cpu.gpr[6] & cr0::PE, 1);
    assert_eq!(m.cpu.gpr[7] & rflags::IF, 0);
    assert_eq!(m.cpu.gpr[1], CODE + 7);
    assert_eq!((m.u64_at(STACK0 - 32), m.u64_at(STACK0 - 8)), (0x3b, 0x33));
    assert_ne!(m.u64_at(STACK0 - 24) & rflags::IF, 0);
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    let cases: [(&str, fn(&mut CodeAssembler) -> Result<(), IcedError>); 7] = [
        ("hlt", |a| a.hlt()),
        ("cli", |a| a.cli()),
        ("rdmsr", |a| a.rdmsr()),
        ("mov cr3", |a| a.mov(cr3, rax)),
        ("wbinvd", |a| a.wbinvd()),
        ("in", |a| a.in_(al, dx)),
        ("lgdt", |a| a.lgdt(ptr(rsp))),
    ];
    for (name, code) in cases {
        let mut m = long(code);
        m.drop_privilege(CODE, 0x9000);
        m.run_to_halt();
        assert_eq!((m.halted_in_handler(), m.u64_at(STACK0 - 48)), (13, 0), "{name}");
    }
}

#[test]
fn the_io_bitmap_opens_ports_one_by_one() {
    let mut m = long(|a| {
        a.in_(al, 0x60)?;
        a.mov(ebx, 1)?;
        a.in_(al, 0x61)
    });
    m.cpu.tr.limit = 0x67 + 0x20;
    m.put(TSS + 0x66, &0x68u16.to_le_bytes());
    m.put(TSS + 0x68, &[0xff; 0x20]);
    m.put(TSS + 0x68 + 0x60 / 8, &[0xfe]);
    m.drop_privilege(CODE, 0x9000);
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[3], m.cpu.gpr[0] & 0xff), (13, 1, 0xff));
}

#[test]
fn umip_hides_the_tables_from_user_mode() {
    let mut m = long(|a| a.sgdt(ptr(rsp - 64)));
    m.drop_privilege(CODE, 0x9000);
    m.cpu.cr4 |= cr4::UMIP;
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 13);
}

#[test]
fn a_32_bit_interrupt_from_user_mode_pushes_five_doublewords() {
    let mut m = protected(|a| a.int(0x80));
    m.drop_privilege(CODE, 0x9000);
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[4]), (0x80, STACK0 - 20));
    assert_eq!(m.u32_at(STACK0 - 20), CODE as u32 + 2);
    assert_eq!((m.u32_at(STACK0 - 8), m.u32_at(STACK0 - 4)), (0x9000, DATA3.into()));
}

#[test]
fn a_call_gate_copies_parameters_to_the_inner_stack() {
    let mut m = protected(|a| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        a.db(&[0x9a, 0, 0, 0, 0, 0x33, 0])?; // call 0x33:0
        a.ud2()
    });
    let inner = assemble(32, 0x2_1000, |a| {
        a.mov(eax, dword_ptr(esp + 8))?;
        a.mov(ebx, dword_ptr(esp + 12))?;
        a.retf_1(8)
    });
    m.put(0x2_1000, &inner);
    m.put(GDT + 0x30, &gate(CODE0, 0x2_1000, 0xec, 2).to_le_bytes());
    m.drop_privilege(CODE, 0x9000);
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[0], m.cpu.gpr[3]), (0x2222, 0x1111));
    assert_eq!(m.halted_in_handler(), 6);
    // Both stacks released the parameters.
    assert_eq!(m.u32_at(STACK0 - 8), 0x9000);
}

#[test]
fn a_task_switch_saves_and_loads_everything() {
    let mut m = protected(|a| {
        a.mov(eax, 0x1234)?;
        a.db(&[0x9a, 0, 0, 0, 0, 0x30, 0])?; // call 0x30:0, a task state segment
        a.mov(ecx, 0x55)?;
        a.hlt()
    });
    const OTHER: u64 = 0x1_5000;
    m.put(GDT + 0x30, &descriptor(OTHER as u32, 0x67, 0x89, 0).to_le_bytes());
    m.put(GDT + 0x28, &descriptor(TSS as u32, 0x67, 0x8b, 0).to_le_bytes());
    let task = assemble(32, 0x2_1000, |a| {
        a.mov(ebx, eax)?;
        a.iretd()?;
        a.nop()
    });
    m.put(0x2_1000, &task);
    let mut image = [0u8; 0x68];
    let mut dword = |at: usize, v: u32| image[at..at + 4].copy_from_slice(&v.to_le_bytes());
    dword(0x20, 0x2_1000);
    dword(0x24, 2);
    dword(0x28, 0xaaaa); // EAX
    dword(0x38, 0xa000); // ESP
    for (n, s) in [DATA0, CODE0, DATA0, DATA0, DATA0, DATA0].into_iter().enumerate() {
        dword(0x48 + 4 * n, s.into());
    }
    m.put(OTHER, &image);
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[0], m.cpu.gpr[1], m.cpu.gpr[3]), (0x1234, 0x55, 0));
    assert_eq!(m.u32_at(OTHER + 0x34), 0xaaaa); // EBX of the other task, saved on return
    assert_eq!(m.u16_at(OTHER), TASK); // its link
    assert_eq!(m.bytes::<1>(GDT + 0x35)[0], 0x89); // no longer busy
    assert_eq!(m.cpu.rflags & rflags::NT, 0);
    assert_ne!(m.cpu.cr0 & cr0::TS, 0);
}

#[test]
fn virtual_8086_mode_runs_16_bit_code_and_faults_out_of_it() {
    let mut m = protected(|a| {
        for v in [0i32, 0, 0x300, 0x3000, 0x4000, 0x8000] {
            a.push(v)?; // GS FS DS ES SS ESP
        }
        a.push(0x2_0002 | (3 << 12))?; // VM, IOPL 3
        a.push(0x3000)?;
        a.push(0x10)?;
        a.iretd()
    });
    let code = assemble(16, 0x10, |a| {
        a.mov(ax, 0x1234)?;
        a.mov(word_ptr(0x20), ax)?;
        a.push(ax)?;
        a.int(0x21)
    });
    m.put(0x3_0010, &code);
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 0x21);
    assert_eq!(m.u16_at(0x3020), 0x1234);
    assert_eq!(m.u16_at(0x4_7ffe), 0x1234);
    // SS:ESP and then ES, DS, FS, GS on the inner stack.
    let top = STACK0 - 16;
    assert_eq!((m.u32_at(top), m.u32_at(top + 4)), (0x3000, 0x300));
    assert_eq!((m.u32_at(top - 8), m.u32_at(top - 4)), (0x7ffe, 0x4000));
    assert_ne!(m.u32_at(top - 12) & rflags::VM as u32, 0);
    assert!(m.cpu.seg[seg::DS].attr.unusable());
}

#[test]
fn mov_ss_holds_off_interrupts_for_one_instruction() {
    let mut m = long(|a| {
        a.mov(eax, DATA0 as i32)?;
        a.mov(ss, eax)?;
        a.mov(ecx, 1)?;
        a.mov(edx, 1)?;
        a.hlt()
    });
    m.cpu.rflags |= rflags::IF;
    let link = m.board.ctx.links[0].clone();
    // Pending from the start: the engine asks before the first instruction.
    link.raise(cpum::ForcedActions::INTERRUPT);
    assert!(matches!(m.run(), Exit::Attention));
    assert_eq!(m.cpu.rip, CODE);
    m.cpu.rip = CODE + 5;
    m.cpu.gpr[2] = 0;
    m.cpu.gpr[0] = DATA0.into();
    link.clear(cpum::ForcedActions::INTERRUPT);
    m.cpu.inhibit_rip = Some(CODE + 5);
    link.raise(cpum::ForcedActions::INTERRUPT);
    // The shadow of the instruction before covers MOV SS, whose own covers the next.
    assert!(matches!(m.run(), Exit::Attention));
    assert_eq!((m.cpu.rip, m.cpu.gpr[1], m.cpu.gpr[2]), (CODE + 12, 1, 0));
}
