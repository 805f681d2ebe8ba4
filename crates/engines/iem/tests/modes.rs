//! Changes between real, protected, compatibility and 64-bit mode.

use cpum::state::{cr0, efer, rflags};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use iem::testing::*;

fn assemble(bits: u32, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Pages and a GDT that [`Machine::long`] and [`Machine::tables`] would make, in a machine that starts in real mode.
fn real_with_tables() -> Machine {
    let mut prepared = Machine::long(0);
    prepared.tables();
    prepared.put(GDT + 0x30, &descriptor(0, 0xfffff, 0x9b, 0xc).to_le_bytes()); // 32-bit code
    prepared.put(GDT + 0x38, &descriptor(0, 0xffff, 0x9b, 0).to_le_bytes()); // 16-bit code
    prepared.put(GDT + 0x40, &descriptor(0, 0xffff, 0x93, 0).to_le_bytes()); // 16-bit data
    let mut m = Machine::real(0x7000);
    let mut image = vec![0; 0x2_0000];
    prepared.board.ram.read(0, &mut image);
    m.put(0, &image);
    m.put(0x6000, &[0xff, 0, 0, 0, 1, 0]); // GDTR image
    m.put(0x6008, &[0xff, 0x0f, 0, 0x10, 1, 0]); // IDTR image
    m
}

#[test]
fn a_loader_goes_from_real_to_64_bit_mode_and_back() {
    let mut m = real_with_tables();
    let real = assemble(16, 0x7000, |a| {
        a.lgdt(ptr(0x6000))?;
        a.lidt(ptr(0x6008))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea, 0, 0x71, 0, 0, 0x30, 0]) // jmp 0x30:0x7100
    });
    m.put(0x7000, &real);
    let protected = assemble(32, 0x7100, |a| {
        a.mov(eax, u32::from(DATA0))?;
        a.mov(ds, eax)?;
        a.mov(ss, eax)?;
        a.mov(esp, 0x9000)?;
        a.mov(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.mov(eax, 0x100)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 1 << 31)?;
        a.mov(cr0, eax)?;
        // Compatibility mode: still 32-bit code.
        a.mov(ebx, 0x1111)?;
        a.db(&[0xea, 0, 0x73, 0, 0, 8, 0]) // jmp 8:0x7300
    });
    m.put(0x7100, &protected);
    let long = assemble(64, 0x7300, |a| {
        a.mov(r8, 0x1122_3344_5566_7788u64)?;
        a.push(0x30)?;
        a.push(0x7400)?;
        a.db(&[0x48, 0xcb]) // retfq
    });
    m.put(0x7300, &long);
    let back = assemble(32, 0x7400, |a| {
        a.mov(eax, cr0)?;
        a.and(eax, 0x7fff_ffff)?;
        a.mov(cr0, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.mov(esi, eax)?;
        a.db(&[0xea, 0x80, 0x74, 0, 0, 0x38, 0]) // jmp 0x38:0x7480
    });
    m.put(0x7400, &back);
    let leave = assemble(16, 0x7480, |a| {
        a.mov(ax, 0x40)?;
        a.mov(ds, ax)?;
        a.mov(eax, cr0)?;
        a.and(al, 0xfeu32 as i32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea, 0xb0, 0x74, 0, 0]) // jmp 0:0x74b0
    });
    m.put(0x7480, &leave);
    let end = assemble(16, 0x74b0, |a| {
        a.mov(ax, 0x1000)?;
        a.mov(ds, ax)?;
        a.mov(al, byte_ptr(0x0a))?; // a byte of the GDT at 0x10000
        a.hlt()
    });
    m.put(0x74b0, &end);
    m.put(0x1_000a, &[0x5a]);
    m.run_to_halt();
    assert_eq!(m.cpu.rip, 0x74b0 + end.len() as u64);
    assert_eq!(
        (m.cpu.gpr[8], m.cpu.gpr[3] & 0xffff, m.cpu.gpr[0] & 0xff),
        (0x1122_3344_5566_7788, 0x1111, 0x5a)
    );
    // LME stays, LMA went with paging.
    assert_eq!(m.cpu.gpr[6] & (efer::LME | efer::LMA), efer::LME);
    assert_eq!((m.cpu.cr0 & (cr0::PE | cr0::PG), m.cpu.seg[3].base), (0, 0x1_0000));
}

#[test]
fn unreal_mode_keeps_big_limits() {
    let mut m = Machine::real(0x7000);
    m.put(0x6000, &[0xff, 0, 0, 0, 1, 0]);
    m.put(GDT + 8, &descriptor(0, 0xfffff, 0x93, 0x8).to_le_bytes());
    let code = assemble(16, 0x7000, |a| {
        a.lgdt(ptr(0x6000))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.mov(bx, 8)?;
        a.mov(ds, bx)?;
        a.and(al, 0xfeu32 as i32)?;
        a.mov(cr0, eax)?;
        a.xor(bx, bx)?;
        a.mov(ds, bx)?;
        a.mov(edi, 0x20_0000)?;
        a.mov(byte_ptr(edi), 0x77)?;
        a.hlt()
    });
    m.put(0x7000, &code);
    m.run_to_halt();
    assert_eq!(m.bytes::<1>(0x20_0000), [0x77]);
}

#[test]
fn real_mode_interrupts_push_three_words_and_iret_pops_them() {
    let mut m = Machine::real(0x7000);
    let code = assemble(16, 0x7000, |a| {
        a.sti()?;
        a.int(0x21)?;
        a.mov(bx, ax)?;
        a.hlt()
    });
    m.put(0x7000, &code);
    m.put(0x21 * 4, &[0x00, 0x01, 0x00, 0x05]); // 0500:0100
    let handler = assemble(16, 0x5100, |a| {
        a.pushf()?;
        a.pop(cx)?;
        a.mov(ax, 0x1234)?;
        a.iret()
    });
    m.put(0x5100, &handler);
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[3] & 0xffff, m.cpu.gpr[4]), (0x1234, 0x8000));
    assert_eq!(m.cpu.gpr[1] & rflags::IF, 0);
    assert_ne!(m.cpu.rflags & rflags::IF, 0);
}

#[test]
fn compatibility_mode_truncates_addresses_and_uses_segment_bases() {
    let mut m = Machine::long(0x7000);
    m.tables();
    m.put(GDT + 0x30, &descriptor(0x1000, 0xfffff, 0x9b, 0xc).to_le_bytes());
    m.put(GDT + 0x38, &descriptor(0x10_0000, 0xfffff, 0x93, 0xc).to_le_bytes());
    let long = assemble(64, 0x7000, |a| {
        a.push(0x30)?;
        a.push(0x7100)?;
        a.db(&[0x48, 0xcb]) // retfq
    });
    m.put(0x7000, &long);
    let code = assemble(32, 0x7100, |a| {
        a.mov(eax, 0x38)?;
        a.mov(ds, eax)?;
        a.mov(ebx, 0xffff_fff0u32)?;
        a.mov(dword_ptr(ebx + 0x20), 0xabcd)?; // wraps to offset 0x10
        a.hlt()
    });
    m.put(0x8100, &code);
    m.run_to_halt();
    assert_eq!(m.u32_at(0x10_0010), 0xabcd);
}

#[test]
fn mode_bits_that_exclude_each_other_fault() {
    let cases: [(&str, fn(&mut CodeAssembler) -> Result<(), IcedError>); 4] = [
        ("CR0.PG without PE", |a| {
            a.mov(rax, cr0)?;
            a.and(eax, !1)?;
            a.mov(cr0, rax)
        }),
        ("CR4.PAE off in long mode", |a| {
            a.mov(rax, cr4)?;
            a.and(eax, !0x20)?;
            a.mov(cr4, rax)
        }),
        ("EFER.LME while paging", |a| {
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.and(eax, !0x100)?;
            a.wrmsr()
        }),
        ("an unknown MSR", |a| {
            a.mov(ecx, 0x1234_5678u32)?;
            a.rdmsr()
        }),
    ];
    for (name, code) in cases {
        let mut m = Machine::long(0x2_0000);
        m.tables();
        m.put(0x2_0000, &assemble(64, 0x2_0000, code));
        m.run_to_halt();
        assert_eq!((m.halted_in_handler(), m.u64_at(m.cpu.gpr[4])), (13, 0), "{name}");
    }
}

#[test]
fn vex_encoded_integer_instructions_need_protected_mode() {
    let andn = [0xc4, 0xe2, 0x70, 0xf2, 0xc2]; // andn eax, ecx, edx
    let mut m = Machine::real(0x7000);
    m.put(0x7000, &andn);
    m.put(6 * 4, &[0, 0x60, 0, 0]);
    m.put(0x6000, &[0xf4]);
    m.run_to_halt();
    assert_eq!(m.cpu.rip, 0x6001);
    let mut m = Machine::protected(0x7000);
    m.cpu.gpr[1] = 0xf0;
    m.cpu.gpr[2] = 0xff;
    m.put(0x7000, &andn);
    m.put(0x7005, &[0xf4]);
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[0], 0x0f);
}

#[test]
fn a_deadline_is_kept_in_the_counter_all_vcpus_share() {
    let mut m = Machine::long(0x2_0000);
    m.tables();
    m.cpu.msr.tsc_offset = 1_000;
    let code = assemble(64, 0x2_0000, |a| {
        a.mov(ecx, 0x6e0u32)?;
        a.xor(edx, edx)?;
        a.mov(eax, 5_000)?;
        a.wrmsr()?;
        // TSC_ADJUST moves the vCPU's counter by 500: the deadline keeps its own value.
        a.mov(ecx, 0x3bu32)?;
        a.mov(eax, 500)?;
        a.wrmsr()?;
        a.mov(ecx, 0x6e0u32)?;
        a.rdmsr()?;
        a.hlt()
    });
    m.put(0x2_0000, &code);
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[0], 5_000);
    let shared = m.board.ctx.irq.read_msr(vbox_types::VcpuId(0), 0x6e0);
    assert_eq!((m.cpu.msr.tsc_offset, shared), (1_500, Some(3_500)));
}
