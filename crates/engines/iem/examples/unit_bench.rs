//! Cost of single instructions in the unit, in nanoseconds per execution.

use std::cell::Cell;
use std::time::Instant;

use cpum::CpuState;
use iced_x86::{Decoder, DecoderOptions};
use iem::unit::{StubId, Unit, classify};

fn main() {
    let cases: [(&str, &[u8]); 14] = [
        ("paddq xmm, xmm", &[0x66, 0x0f, 0xd4, 0xc1]),
        ("movups xmm, [m]", &[0x0f, 0x10, 0x00]),
        ("movups [m], xmm", &[0x0f, 0x11, 0x00]),
        ("addsd xmm, xmm", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("mulsd xmm, [m]", &[0xf2, 0x0f, 0x59, 0x00]),
        ("cvtsi2sd xmm, rax", &[0xf2, 0x48, 0x0f, 0x2a, 0xc0]),
        ("ucomisd xmm, xmm", &[0x66, 0x0f, 0x2e, 0xc1]),
        ("pmovmskb eax, xmm", &[0x66, 0x0f, 0xd7, 0xc1]),
        ("vpaddq ymm, ymm, ymm", &[0xc5, 0xf5, 0xd4, 0xc2]),
        ("vmovdqu ymm, [m]", &[0xc5, 0xfe, 0x6f, 0x00]),
        ("paddb mm, mm", &[0x0f, 0xfc, 0xc1]),
        ("fadd st0, st1", &[0xd8, 0xc1]),
        ("fld m64 + fstp m64", &[0xdd, 0x00]),
        ("fnstsw ax", &[0xdf, 0xe0]),
    ];
    let mut unit = Unit::of_host().unwrap();
    let mut cpu = CpuState::reset(0);
    cpu.cr0 |= 1;
    let pop = Decoder::with_ip(64, &[0xdd, 0x18], 0, DecoderOptions::NONE).decode();
    let pop_slot = Cell::new(StubId::NONE);
    const ROUNDS: u32 = 1_000_000;
    for (name, bytes) in cases {
        let insn = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        let class = classify(&insn).unwrap();
        let slot = Cell::new(StubId::NONE);
        let mut best = f64::MAX;
        #[repr(align(32))]
        struct Operand([u8; 32]);
        let mut operand = Operand([0; 32]);
        for _ in 0..5 {
            let start = Instant::now();
            for _ in 0..ROUNDS {
                unit.execute(&slot, &insn, &mut cpu, &mut operand.0[..usize::from(class.size)], 0).unwrap();
                if name.starts_with("fld") {
                    unit.execute(&pop_slot, &pop, &mut cpu, &mut operand.0[..8], 0).unwrap();
                }
            }
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(ROUNDS));
        }
        println!("{name:24} {best:6.1} ns");
    }
}
