//! Programs on which engines once differed.

use conformance::Kind;
use conformance::stream::compare::{Tolerance, differences};
use conformance::stream::mode::{DATA, PROGRAM};
use conformance::stream::program::{Case, Item, SCRATCH, absolute};
use conformance::stream::{Guest, Mode};
use cpum::state::rflags;
use iced_x86::{Code, Instruction, MemoryOperand, OpKind, Register};

/// Runs a program on the interpreter and on every other engine and gives the interpreter's outcome.
fn agree(case: &Case) -> conformance::stream::guest::Outcome {
    let assembled = case.assemble().expect("a program that fits");
    let oracle = Guest::new(case.mode, Kind::Interpreter, &[]).run(&case.start, &assembled);
    assert_eq!(oracle.end, Ok(()));
    let tolerance = Tolerance { flags_at_faults: true, ..Tolerance::default() };
    for engine in Kind::ALL {
        let outcome = Guest::new(case.mode, *engine, &[]).run(&case.start, &assembled);
        let found = differences(case.mode, &assembled, &oracle, &outcome, tolerance);
        assert!(found.is_empty(), "{engine:?}: {}", found.join("\n"));
    }
    oracle
}

fn items(list: Vec<Result<Instruction, iced_x86::IcedError>>) -> Vec<Item> {
    list.into_iter().map(|i| Item::Insn(i.expect("an instruction"))).collect()
}

#[test]
fn opcode_82_works_in_32_bit_code() {
    let program = items(vec![
        Instruction::with2(Code::Mov_r32_imm32, Register::EBX, 0x1234_5678),
        Instruction::with2(Code::Adc_rm8_imm8_82, Register::BL, 0x91),
        Instruction::with2(Code::Sub_rm8_imm8_82, Register::BH, 0x22),
    ]);
    let outcome = agree(&Case::of(Mode::Flat32, program, 5));
    assert_eq!(outcome.cpu.gpr[3], 0x1234_3409);
}

#[test]
fn a_repeated_comparison_of_nothing_leaves_the_flags() {
    let mut compare = Instruction::default();
    compare.set_code(Code::Cmpsw_m16_m16);
    compare.set_op0_kind(OpKind::MemorySegESI);
    compare.set_op1_kind(OpKind::MemoryESEDI);
    compare.set_has_rep_prefix(true);
    let program = items(vec![
        Ok(Instruction::with(Code::Stc)),
        // An access, whose check needs the host's flags.
        Instruction::with2(Code::Mov_rm32_imm32, absolute(Mode::Flat32, 3, Mode::Flat32.linear() + DATA), 0),
        Instruction::with2(Code::Mov_r32_imm32, Register::ECX, 0),
        Ok(compare),
    ]);
    let outcome = agree(&Case::of(Mode::Flat32, program, 5));
    assert_ne!(outcome.cpu.rflags & rflags::CF, 0);
}

#[test]
fn zeroing_all_vectors_in_32_bit_code_leaves_the_upper_eight() {
    for code in [Code::VEX_Vzeroall, Code::VEX_Vzeroupper] {
        let mut case = Case::of(Mode::Compat32, vec![Item::Insn(Instruction::with(code))], 5);
        for byte in &mut case.start.xsave.0[160..416] {
            *byte = 0x5a;
        }
        for byte in &mut case.start.xsave.0[576..832] {
            *byte = 0xa5;
        }
        let outcome = agree(&case);
        assert_eq!(outcome.cpu.xsave.0[160 + 8 * 16], 0x5a);
        assert_eq!(outcome.cpu.xsave.0[576 + 8 * 16], 0xa5);
    }
}

#[test]
fn a_misaligned_access_to_data_beside_code_faults() {
    for (code, register) in [(Code::Movaps_xmmm128_xmm, Some(Register::XMM1)), (Code::Cmpxchg16b_m128, None)]
    {
        for at in [PROGRAM + SCRATCH + 8, DATA + 8] {
            let linear = (Mode::User64.linear() + at) as i64;
            let operand =
                MemoryOperand::new(Register::RIP, Register::None, 1, linear, 8, false, Register::None);
            let access = match register {
                Some(register) => Instruction::with2(code, operand, register),
                None => Instruction::with1(code, operand),
            };
            let outcome = agree(&Case::of(Mode::User64, items(vec![access]), 5));
            assert_eq!(outcome.log.first().map(|v| v & 0xff), Some(13), "{code:?} at 0x{at:x}");
        }
    }
}

#[test]
fn a_bit_string_with_a_32_bit_address_lies_in_its_segment() {
    for segment in [Register::FS, Register::GS] {
        let operand = MemoryOperand::new(Register::EBP, Register::R11D, 2, 0, 0, false, segment);
        let program = items(vec![
            Instruction::with2(Code::Mov_r32_imm32, Register::EBP, 0x40),
            Instruction::with2(Code::Mov_r32_imm32, Register::R11D, 0x10),
            Instruction::with2(Code::Mov_r32_imm32, Register::R12D, 0x88),
            Instruction::with2(Code::Bt_rm64_r64, operand, Register::R12),
        ]);
        agree(&Case::of(Mode::Kernel64, program, 5));
    }
}

#[test]
fn a_read_that_faults_on_its_second_page_reads_no_register_on_the_first() {
    // The registers' page, and one that only the kernel may read.
    let linear = (Mode::User64.linear() + DATA + 11 * 0x1000 + 0xffc) as i64;
    let operand = MemoryOperand::new(Register::RIP, Register::None, 1, linear, 8, false, Register::None);
    let read = Instruction::with2(Code::Mov_r64_rm64, Register::RAX, operand);
    let outcome = agree(&Case::of(Mode::User64, items(vec![read]), 5));
    assert_eq!(outcome.log.first().map(|v| v & 0xff), Some(14));
    assert!(outcome.accesses.is_empty(), "{:x?}", outcome.accesses);
}
