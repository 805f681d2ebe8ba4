use std::cell::Cell;

use cpum::CpuState;
use cpum::state::{cr0, cr4, efer, gpr, rflags};
use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::*;

fn decode(bytes: &[u8]) -> Instruction {
    let insn = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
    assert!(!insn.is_invalid(), "{bytes:02x?}");
    insn
}

fn long_mode() -> CpuState {
    let mut cpu = CpuState::reset(0);
    cpu.cr0 = cr0::PE | cr0::PG | cr0::MP | cr0::NE | cr0::ET;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.xcr0 = 7;
    cpu.msr.efer = efer::LME | efer::LMA;
    let attr = cpu.seg[cpum::state::seg::CS].attr.with_long(true);
    cpu.seg[cpum::state::seg::CS].attr = attr;
    cpu.rip = 0x1000;
    cpu
}

fn run(cpu: &mut CpuState, bytes: &[u8], mem: &mut [u8]) -> Result<(), Fault> {
    let mut unit = Unit::of_host().unwrap();
    let insn = decode(bytes);
    let class = classify(&insn).expect("not an instruction of the unit");
    class.check(cpu)?;
    assert_eq!(usize::from(class.size), mem.len());
    unit.execute(&Cell::new(StubId::NONE), &insn, cpu, mem, 0x5000)
}

fn set_xmm(cpu: &mut CpuState, n: usize, value: u128) {
    cpu.xsave.0[area::XMM + 16 * n..area::XMM + 16 * n + 16].copy_from_slice(&value.to_le_bytes());
}

fn xmm(cpu: &CpuState, n: usize) -> u128 {
    u128::from_le_bytes(cpu.xsave.0[area::XMM + 16 * n..area::XMM + 16 * n + 16].try_into().unwrap())
}

fn set_high(cpu: &mut CpuState, n: usize, value: u128) {
    cpu.xsave.0[area::YMM + 16 * n..area::YMM + 16 * n + 16].copy_from_slice(&value.to_le_bytes());
}

fn high(cpu: &CpuState, n: usize) -> u128 {
    u128::from_le_bytes(cpu.xsave.0[area::YMM + 16 * n..area::YMM + 16 * n + 16].try_into().unwrap())
}

fn st(cpu: &CpuState, n: usize) -> [u8; 10] {
    cpu.xsave.0[area::ST + 16 * n..area::ST + 16 * n + 10].try_into().unwrap()
}

const FLD_M64: [u8; 2] = [0xdd, 0x00];
const FSTP_M64: [u8; 2] = [0xdd, 0x18];

fn push(cpu: &mut CpuState, value: f64) {
    run(cpu, &FLD_M64, &mut value.to_le_bytes()).unwrap();
}

fn pop(cpu: &mut CpuState) -> f64 {
    let mut out = [0; 8];
    run(cpu, &FSTP_M64, &mut out).unwrap();
    f64::from_le_bytes(out)
}

#[test]
fn legacy_sse_keeps_the_upper_half_and_vex_clears_it() {
    let mut cpu = long_mode();
    set_xmm(&mut cpu, 9, 5);
    set_high(&mut cpu, 9, 77);
    // paddq xmm9, [rax]
    run(&mut cpu, &[0x66, 0x44, 0x0f, 0xd4, 0x08], &mut 3u128.to_le_bytes()).unwrap();
    assert_eq!((xmm(&cpu, 9), high(&cpu, 9)), (8, 77));
    // vpaddq xmm9, xmm9, [rax]
    run(&mut cpu, &[0xc5, 0x31, 0xd4, 0x08], &mut 3u128.to_le_bytes()).unwrap();
    assert_eq!((xmm(&cpu, 9), high(&cpu, 9)), (11, 0));
}

#[test]
fn ymm_operations_use_both_halves() {
    let mut cpu = long_mode();
    set_xmm(&mut cpu, 1, 1);
    set_high(&mut cpu, 1, 2);
    let mut mem = [0; 32];
    mem[0] = 10;
    mem[16] = 20;
    // vpaddq ymm15, ymm1, [rax]
    run(&mut cpu, &[0xc5, 0x75, 0xd4, 0x38], &mut mem).unwrap();
    assert_eq!((xmm(&cpu, 15), high(&cpu, 15)), (11, 22));
}

#[test]
fn general_registers_are_reached_wherever_they_are() {
    let mut cpu = long_mode();
    cpu.gpr[15] = (-7i64) as u64;
    // cvtsi2sd xmm0, r15
    run(&mut cpu, &[0xf2, 0x49, 0x0f, 0x2a, 0xc7], &mut []).unwrap();
    assert_eq!(f64::from_bits(xmm(&cpu, 0) as u64), -7.0);
    cpu.gpr[gpr::RSI] = u64::MAX;
    // cvttsd2si esi, xmm0: the upper half is cleared
    run(&mut cpu, &[0xf2, 0x0f, 0x2c, 0xf0], &mut []).unwrap();
    assert_eq!(cpu.gpr[gpr::RSI], u64::from(-7i32 as u32));
    // cvttsd2si rdi, xmm0
    run(&mut cpu, &[0xf2, 0x48, 0x0f, 0x2c, 0xf8], &mut []).unwrap();
    assert_eq!(cpu.gpr[gpr::RDI] as i64, -7);
}

#[test]
fn implicit_registers_of_pcmpestri_are_used() {
    let mut cpu = long_mode();
    set_xmm(&mut cpu, 0, u128::from_le_bytes(*b"z\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"));
    cpu.gpr[gpr::RAX] = 1;
    cpu.gpr[gpr::RDX] = 16;
    cpu.gpr[gpr::RCX] = u64::MAX;
    // pcmpestri xmm0, [rax], 0: equal any
    run(&mut cpu, &[0x66, 0x0f, 0x3a, 0x61, 0x00, 0x00], &mut b"abcdefghizklmnop".to_owned()).unwrap();
    assert_eq!(cpu.gpr[gpr::RCX], 9);
    assert_ne!(cpu.rflags & rflags::CF, 0);
}

#[test]
fn comparison_writes_arithmetic_flags_only() {
    let mut cpu = long_mode();
    cpu.rflags = rflags::FIXED | rflags::IF | rflags::DF | rflags::OF | rflags::CF;
    set_xmm(&mut cpu, 2, u128::from(1.5f32.to_bits()));
    // comiss xmm2, [rax]
    run(&mut cpu, &[0x0f, 0x2f, 0x10], &mut 1.5f32.to_le_bytes()).unwrap();
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::IF | rflags::DF | rflags::ZF);
}

#[test]
fn guest_rounding_is_honoured_and_flags_are_sticky() {
    let mut cpu = long_mode();
    set_mxcsr(&mut cpu.xsave, 0x5f80 | 1); // towards plus infinity, invalid already raised
    set_xmm(&mut cpu, 0, u128::from(1.0f32.to_bits()));
    // divss xmm0, [rax]
    run(&mut cpu, &[0xf3, 0x0f, 0x5e, 0x00], &mut 3.0f32.to_le_bytes()).unwrap();
    assert_eq!(xmm(&cpu, 0) as u32, (1.0f32 / 3.0).to_bits().max(0x3eaa_aaab));
    assert_eq!(mxcsr(&cpu.xsave), 0x5f80 | 1 | 0x20);
}

#[test]
fn unmasked_sse_exception_leaves_the_destination() {
    let mut cpu = long_mode();
    set_mxcsr(&mut cpu.xsave, 0x1f80 & !(1 << 9)); // divide by zero unmasked
    set_xmm(&mut cpu, 0, u128::from(1.0f32.to_bits()));
    let before = xmm(&cpu, 0);
    assert_eq!(run(&mut cpu, &[0xf3, 0x0f, 0x5e, 0x00], &mut [0; 4]), Err(Fault::XM));
    assert_eq!(xmm(&cpu, 0), before);
    assert_eq!(mxcsr(&cpu.xsave) & 0x3f, 4);
    cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(run(&mut cpu, &[0xf3, 0x0f, 0x5e, 0x00], &mut [0; 4]), Err(Fault::UD));
}

#[test]
fn unmasked_underflow_is_raised_for_exact_tiny_results() {
    let mut cpu = long_mode();
    set_mxcsr(&mut cpu.xsave, 0x1f80 & !(1 << 11));
    set_xmm(&mut cpu, 0, u128::from(f32::MIN_POSITIVE.to_bits()));
    // mulss xmm0, [rax]
    assert_eq!(run(&mut cpu, &[0xf3, 0x0f, 0x59, 0x00], &mut 0.5f32.to_le_bytes()), Err(Fault::XM));
    assert_eq!(xmm(&cpu, 0) as u32, f32::MIN_POSITIVE.to_bits());
    assert_eq!(mxcsr(&cpu.xsave) & 0x3f, 0x10);
}

#[test]
fn x87_computes_and_keeps_its_stack() {
    let mut cpu = long_mode();
    push(&mut cpu, 2.0);
    push(&mut cpu, 0.25);
    assert_eq!(x87::top(&cpu.xsave), 6);
    assert_eq!(cpu.xsave.0[area::FTW], 0xc0);
    run(&mut cpu, &[0xde, 0xc9], &mut []).unwrap(); // fmulp
    assert_eq!(pop(&mut cpu), 0.5);
    assert_eq!((x87::top(&cpu.xsave), cpu.xsave.0[area::FTW]), (0, 0));
    assert_eq!(u64_at(&cpu.xsave, area::FIP), 0x1000);
    assert_eq!(u64_at(&cpu.xsave, area::FDP), 0x5000);
    assert_eq!(u16_at(&cpu.xsave, area::FOP), 0x518);
}

#[test]
fn unmasked_x87_exception_is_reported_by_the_next_waiting_instruction() {
    let mut cpu = long_mode();
    run(&mut cpu, &[0xd9, 0x28], &mut 0x37bu16.to_le_bytes()).unwrap(); // fldcw: divide by zero unmasked
    push(&mut cpu, 1.0);
    push(&mut cpu, 0.0);
    run(&mut cpu, &[0xde, 0xf9], &mut []).unwrap(); // fdivp: deferred
    assert_eq!(u16_at(&cpu.xsave, area::FSW) & 0x80bf, 0x8084);
    assert_eq!(run(&mut cpu, &[0xd9, 0xd0], &mut []), Err(Fault::MF)); // fnop
    assert_eq!(run(&mut cpu, &[0x9b], &mut []), Err(Fault::MF)); // wait
    run(&mut cpu, &[0xdf, 0xe0], &mut []).unwrap(); // fnstsw ax
    assert_eq!(cpu.gpr[gpr::RAX] & 0x80ff, 0x8084);
    run(&mut cpu, &[0xdb, 0xe2], &mut []).unwrap(); // fnclex
    run(&mut cpu, &[0xd9, 0xd0], &mut []).unwrap();
}

#[test]
fn fcmov_reads_and_fcomi_writes_flags() {
    let mut cpu = long_mode();
    push(&mut cpu, 3.0);
    push(&mut cpu, 4.0);
    run(&mut cpu, &[0xdb, 0xf1], &mut []).unwrap(); // fcomi st1: 4 > 3
    assert_eq!(cpu.rflags & rflags::ARITH, 0);
    cpu.rflags |= rflags::CF;
    run(&mut cpu, &[0xda, 0xc1], &mut []).unwrap(); // fcmovb st1
    assert_eq!(pop(&mut cpu), 3.0);
}

#[test]
fn mmx_takes_over_the_x87_registers() {
    let mut cpu = long_mode();
    push(&mut cpu, 1.0); // physical register 7
    let one = st(&cpu, 0);
    // paddb mm3, [rax]
    run(&mut cpu, &[0x0f, 0xfc, 0x18], &mut [9; 8]).unwrap();
    assert_eq!((x87::top(&cpu.xsave), cpu.xsave.0[area::FTW]), (0, 0xff));
    assert_eq!(st(&cpu, 3), [9, 9, 9, 9, 9, 9, 9, 9, 0xff, 0xff]);
    assert_eq!(st(&cpu, 7), one);
    run(&mut cpu, &[0x0f, 0x77], &mut []).unwrap(); // emms
    assert_eq!(cpu.xsave.0[area::FTW], 0);
}

#[test]
fn fsave_and_frstor_return_the_same_state() {
    let mut cpu = long_mode();
    push(&mut cpu, 1.0);
    push(&mut cpu, 0.0);
    push(&mut cpu, f64::INFINITY);
    let before = cpu.clone();
    let mut image = [0; 108];
    run(&mut cpu, &[0xdd, 0x30], &mut image).unwrap(); // fnsave
    // Physical 7: valid, 6: zero, 5: special, the rest empty.
    assert_eq!(u16::from_le_bytes([image[8], image[9]]), 0b00_01_10_11_11_11_11_11);
    assert_eq!(cpu.xsave.0[area::FTW], 0);
    run(&mut cpu, &[0xdd, 0x20], &mut image).unwrap(); // frstor
    assert_eq!(cpu.xsave.0[..area::XMM], before.xsave.0[..area::XMM]);
}

#[test]
fn registers_stay_where_they_are_when_top_changes() {
    let mut cpu = long_mode();
    push(&mut cpu, 1.0); // physical register 7
    let one = st(&cpu, 0);
    run(&mut cpu, &[0xdb, 0xe3], &mut []).unwrap(); // fninit
    assert_eq!((st(&cpu, 7), st(&cpu, 0)), (one, [0; 10]));
    let mut environment = [0; 28];
    run(&mut cpu, &[0xd9, 0x30], &mut environment).unwrap(); // fnstenv
    environment[5] = 7 << 3; // TOP in the status word
    run(&mut cpu, &[0xd9, 0x20], &mut environment).unwrap(); // fldenv
    assert_eq!((st(&cpu, 0), st(&cpu, 1)), (one, [0; 10]));
}

#[test]
fn fxsave_and_fxrstor_return_the_same_state() {
    let mut cpu = long_mode();
    push(&mut cpu, 1.0);
    set_xmm(&mut cpu, 15, 42);
    let before = cpu.clone();
    let mut image = [0xee; 512];
    run(&mut cpu, &[0x48, 0x0f, 0xae, 0x00], &mut image).unwrap();
    assert!(image[area::XMM_END..].iter().all(|&b| b == 0xee));
    cpu.xsave = XsaveArea::reset();
    run(&mut cpu, &[0x48, 0x0f, 0xae, 0x08], &mut image).unwrap();
    assert!(cpu.xsave.0[..area::MXCSR_MASK] == before.xsave.0[..area::MXCSR_MASK]);
    assert_eq!(xmm(&cpu, 15), 42);
    image[area::MXCSR + 2] = 1;
    assert_eq!(run(&mut cpu, &[0x48, 0x0f, 0xae, 0x08], &mut image), Err(Fault::GP0));
}

#[test]
fn control_registers_gate_each_class() {
    let mut cpu = long_mode();
    cpu.cr0 |= cr0::TS;
    assert_eq!(run(&mut cpu, &[0x0f, 0x58, 0xc0], &mut []), Err(Fault::NM)); // addps
    assert_eq!(run(&mut cpu, &[0xd9, 0xe8], &mut []), Err(Fault::NM)); // fld1
    assert_eq!(run(&mut cpu, &[0x9b], &mut []), Err(Fault::NM)); // wait, with MP
    cpu.cr0 &= !(cr0::TS | cr0::MP);
    cpu.cr4 &= !cr4::OSFXSR;
    assert_eq!(run(&mut cpu, &[0x0f, 0x58, 0xc0], &mut []), Err(Fault::UD));
    run(&mut cpu, &[0xc5, 0xf8, 0x58, 0xc0], &mut []).unwrap(); // vaddps
    cpu.xcr0 = 3;
    assert_eq!(run(&mut cpu, &[0xc5, 0xf8, 0x58, 0xc0], &mut []), Err(Fault::UD));
}

#[test]
fn integer_instructions_are_not_the_units() {
    for bytes in [
        &[0x01, 0xc0][..],                     // add
        &[0x0f, 0xae, 0xf0],                   // mfence
        &[0x0f, 0xc3, 0x00],                   // movnti
        &[0xf2, 0x0f, 0x38, 0xf1, 0xc0],       // crc32
        &[0xf3, 0x0f, 0xb8, 0xc0],             // popcnt
        &[0xc4, 0xe2, 0x78, 0xf2, 0xc0],       // andn
        &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0], // vaddps zmm
        &[0x0f, 0x44, 0xc0],                   // cmove
        &[0x0f, 0x18, 0x00],                   // prefetchnta
    ] {
        assert!(classify(&decode(bytes)).is_none(), "{bytes:02x?}");
    }
}

#[test]
fn alignment_is_asked_for_where_the_architecture_does() {
    let align = |bytes: &[u8]| classify(&decode(bytes)).unwrap().align;
    assert_eq!(align(&[0x0f, 0x58, 0x00]), 16); // addps
    assert_eq!(align(&[0x0f, 0x28, 0x00]), 16); // movaps
    assert_eq!(align(&[0x0f, 0x10, 0x00]), 1); // movups
    assert_eq!(align(&[0xf3, 0x0f, 0x58, 0x00]), 1); // addss
    assert_eq!(align(&[0xc5, 0xfc, 0x58, 0x00]), 1); // vaddps ymm
    assert_eq!(align(&[0xc5, 0xfc, 0x28, 0x00]), 32); // vmovaps ymm
    assert_eq!(align(&[0x66, 0x0f, 0x3a, 0x63, 0x00, 0]), 1); // pcmpistri
    assert_eq!(align(&[0x0f, 0xae, 0x00]), 16); // fxsave
}

#[test]
fn stubs_are_remade_after_the_cache_was_dropped() {
    let mut cpu = long_mode();
    let mut unit = Unit::of_host().unwrap();
    let insn = decode(&[0x66, 0x0f, 0xd4, 0xc0]); // paddq xmm0, xmm0
    let slot = Cell::new(StubId::NONE);
    set_xmm(&mut cpu, 0, 1);
    unit.execute(&slot, &insn, &mut cpu, &mut [], 0).unwrap();
    let before = slot.get();
    unit.flush();
    unit.execute(&slot, &insn, &mut cpu, &mut [], 0).unwrap();
    assert_ne!(slot.get(), before);
    assert_eq!(xmm(&cpu, 0), 4);
}

#[test]
fn operands_that_differ_in_address_only_share_a_stub() {
    let mut unit = Unit::of_host().unwrap();
    let a = unit.prepare(&decode(&[0x0f, 0x58, 0x00])).unwrap();
    let b = unit.prepare(&decode(&[0x0f, 0x58, 0x44, 0x8b, 0x10])).unwrap();
    let c = unit.prepare(&decode(&[0x0f, 0x58, 0x08])).unwrap();
    assert_eq!(a, b);
    assert_ne!(a, c);
}

/// Memory of one page at 0x10000; all else faults.
struct Page(Vec<u8>);

const PAGE: u64 = 0x10000;

impl Page {
    fn range(&self, linear: u64, len: usize) -> Result<std::ops::Range<usize>, Fault> {
        let start = linear.checked_sub(PAGE).ok_or(Fault::pf(0))? as usize;
        if start + len > self.0.len() { Err(Fault::pf(0)) } else { Ok(start..start + len) }
    }
}

impl GuestMemory for Page {
    fn linear(&mut self, _: &CpuState, _: usize, offset: u64, _: u32, _: bool) -> Result<u64, Fault> {
        Ok(offset)
    }

    fn read_bytes(&mut self, _: &CpuState, linear: u64, out: &mut [u8]) -> Result<(), Fault> {
        let range = self.range(linear, out.len())?;
        out.copy_from_slice(&self.0[range]);
        Ok(())
    }

    fn write_bytes(&mut self, _: &CpuState, linear: u64, data: &[u8]) -> Result<(), Fault> {
        let range = self.range(linear, data.len())?;
        self.0[range].copy_from_slice(data);
        Ok(())
    }

    fn probe_write(&mut self, _: &CpuState, linear: u64, size: u32) -> Result<(), Fault> {
        self.range(linear, size as usize).map(|_| ())
    }
}

fn run_memory(cpu: &mut CpuState, bytes: &[u8], memory: &mut Page, offset: u64) -> Result<(), Fault> {
    let insn = decode(bytes);
    let class = classify(&insn).unwrap();
    assert_eq!(class.route, Route::Memory);
    class.check(cpu)?;
    Unit::of_host().unwrap().execute_memory(&insn, cpu, memory, offset)
}

#[test]
fn a_gather_that_faults_keeps_the_elements_before() {
    let mut cpu = long_mode();
    let mut memory = Page(vec![0x11; 4096]);
    cpu.gpr[gpr::RAX] = PAGE;
    set_xmm(&mut cpu, 1, (0x2000u128 << 64) | (8 << 32)); // indices 0, 8, 0x2000, 0
    set_xmm(&mut cpu, 2, u128::MAX);
    // vpgatherdd xmm0, [rax+xmm1], xmm2
    let code = [0xc4, 0xe2, 0x69, 0x90, 0x04, 0x08];
    assert_eq!(run_memory(&mut cpu, &code, &mut memory, 0), Err(Fault::pf(0)));
    assert_eq!(xmm(&cpu, 0), 0x1111_1111_1111_1111);
    assert_eq!(xmm(&cpu, 2), u128::MAX << 64);
    set_xmm(&mut cpu, 1, 0);
    run_memory(&mut cpu, &code, &mut memory, 0).unwrap();
    assert_eq!((xmm(&cpu, 0), xmm(&cpu, 2)), (u128::from_le_bytes([0x11; 16]), 0));
}

#[test]
fn masked_store_touches_chosen_elements_only() {
    let mut cpu = long_mode();
    let mut memory = Page(vec![0; 4096]);
    set_xmm(&mut cpu, 1, (1 << 31) | (1 << 63)); // elements 0 and 1
    set_xmm(&mut cpu, 0, u128::MAX);
    // vmaskmovps [rax], xmm1, xmm0: elements 2 and 3 lie past the page
    run_memory(&mut cpu, &[0xc4, 0xe2, 0x71, 0x2e, 0x00], &mut memory, PAGE + 4088).unwrap();
    assert_eq!(memory.0[4088..], [0xff; 8]);
    set_xmm(&mut cpu, 1, u128::MAX);
    memory.0.fill(0);
    assert!(run_memory(&mut cpu, &[0xc4, 0xe2, 0x71, 0x2e, 0x00], &mut memory, PAGE + 4088).is_err());
    assert_eq!(memory.0[4088..], [0; 8]);
}

#[test]
fn xsave_and_xrstor_return_the_same_state() {
    for save in [&[0x48, 0x0f, 0xae, 0x20][..], &[0x48, 0x0f, 0xae, 0x30], &[0x48, 0x0f, 0xc7, 0x20]] {
        let mut cpu = long_mode();
        let mut memory = Page(vec![0; 4096]);
        push(&mut cpu, 1.0);
        set_xmm(&mut cpu, 3, 33);
        set_high(&mut cpu, 3, 34);
        set_mxcsr(&mut cpu.xsave, 0x1fa0);
        cpu.gpr[gpr::RAX] = u64::MAX;
        cpu.gpr[gpr::RDX] = u64::MAX;
        let before = cpu.clone();
        run_memory(&mut cpu, save, &mut memory, PAGE).unwrap();
        cpu.xsave = XsaveArea::reset();
        run_memory(&mut cpu, &[0x48, 0x0f, 0xae, 0x28], &mut memory, PAGE).unwrap();
        assert!(cpu.xsave.0[..area::MXCSR_MASK] == before.xsave.0[..area::MXCSR_MASK]);
        assert!(cpu.xsave.0[area::ST..area::XMM_END] == before.xsave.0[area::ST..area::XMM_END]);
        assert!(cpu.xsave.0[area::YMM..] == before.xsave.0[area::YMM..]);
    }
}

#[test]
fn xrstor_initialises_what_the_image_lacks_and_refuses_bad_headers() {
    let mut cpu = long_mode();
    let mut memory = Page(vec![0; 4096]);
    memory.0[area::MXCSR..area::MXCSR + 4].copy_from_slice(&0x1f80u32.to_le_bytes());
    set_xmm(&mut cpu, 3, 33);
    set_high(&mut cpu, 3, 34);
    cpu.gpr[gpr::RAX] = 4;
    run_memory(&mut cpu, &[0x48, 0x0f, 0xae, 0x28], &mut memory, PAGE).unwrap();
    assert_eq!((xmm(&cpu, 3), high(&cpu, 3)), (33, 0));
    memory.0[area::XSTATE_BV] = 8;
    assert_eq!(run_memory(&mut cpu, &[0x48, 0x0f, 0xae, 0x28], &mut memory, PAGE), Err(Fault::GP0));
    assert_eq!(run_memory(&mut cpu, &[0x48, 0x0f, 0xae, 0x28], &mut memory, PAGE + 8), Err(Fault::GP0));
}

/// Every form that the table calls the unit's has a stub.
#[test]
fn every_classified_form_can_be_built() {
    use iced_x86::{Code, OpCodeOperandKind, OpKind, Register};
    let mut unit = Unit::of_host().unwrap();
    let (mut built, mut refused) = (0, Vec::new());
    for code in Code::values() {
        let op = code.op_code();
        if !op.mode64() {
            continue;
        }
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_code_size(iced_x86::CodeSize::Code64);
        let mut ok = true;
        for i in 0..op.op_count() {
            use OpCodeOperandKind as K;
            let register = match op.op_kind(i) {
                K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => Register::XMM1 + i,
                K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => Register::YMM1 + i,
                K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM1 + i,
                K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_vvvv => Register::EBX + i,
                K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_vvvv => Register::RBX + i,
                K::sti_opcode => Register::ST1,
                K::st0 => Register::ST0,
                K::ax => Register::AX,
                K::imm8 => {
                    let second = i > 0 && insn.op_kind(i - 1) == OpKind::Immediate8;
                    insn.set_op_kind(i, if second { OpKind::Immediate8_2nd } else { OpKind::Immediate8 });
                    continue;
                }
                K::mem => {
                    insn.set_op_kind(i, OpKind::Memory);
                    insn.set_memory_base(Register::RAX);
                    insn.set_memory_displ_size(0);
                    continue;
                }
                _ => {
                    ok = false;
                    break;
                }
            };
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register);
        }
        let Some(class) = ok.then(|| classify(&insn)).flatten() else { continue };
        if !Features::host().contains(class.features) {
            continue;
        }
        match unit.prepare(&insn) {
            Ok(_) => built += 1,
            Err(_) => refused.push(code),
        }
    }
    assert!(refused.is_empty(), "{refused:?}");
    assert!(built > 900, "{built}");
}
