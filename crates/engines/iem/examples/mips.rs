//! Measures guest instructions per second of host CPU time on small 64-bit loops (`cargo run --release -p iem --example mips`).
//!
//! Baseline, million instructions per second on one Zen CPU at 3.2 GHz with other work beside it: `dec, jne` 343, registers 536,
//! memory 335, calls 262, SSE 118. A Debian 6.1 kernel from power-on to its shell (1.4 thousand million instructions) runs
//! at 280.
use iced_x86::code_asm::*;
use iem::testing::*;

const CODE: u64 = 0x2_0000;

/// Host CPU time of this thread: other work on the machine does not count.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).expect("schedstat") / 1e9
}

fn bench(name: &str, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut m = Machine::long(CODE);
    m.tables();
    let mut a = CodeAssembler::new(64).expect("assembler");
    code(&mut a).expect("code");
    m.put(CODE, &a.assemble(CODE).expect("code"));
    let start = cpu_seconds();
    m.run_to_halt();
    let time = cpu_seconds() - start;
    let n = m.iem.core().instructions() as f64;
    println!(
        "{name:24} {:7.1} million instructions, {:6.1} MIPS, {:.2} ns each",
        n / 1e6,
        n / time / 1e6,
        time / n * 1e9
    );
}

fn main() {
    const N: i32 = 10_000_000;
    bench("dec, jne", |a| {
        let mut top = a.create_label();
        a.mov(ecx, 4 * N)?;
        a.set_label(&mut top)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    bench("registers", |a| {
        let mut top = a.create_label();
        a.mov(ecx, N)?;
        a.set_label(&mut top)?;
        a.lea(rax, ptr(rcx + rcx * 4 + 3))?;
        a.xor(rdx, rax)?;
        a.shl(rax, 5)?;
        a.add(rbx, rax)?;
        a.mov(rsi, rbx)?;
        a.and(esi, 0xff)?;
        a.sub(ecx, 1)?;
        a.jne(top)?;
        a.hlt()
    });
    bench("memory", |a| {
        let mut top = a.create_label();
        a.mov(ecx, N)?;
        a.mov(rdi, 0x10_0000u64)?;
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rdi + 8))?;
        a.add(rax, qword_ptr(rdi + 16))?;
        a.mov(qword_ptr(rdi + 24), rax)?;
        a.inc(dword_ptr(rdi))?;
        a.movzx(edx, byte_ptr(rdi + 3))?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
    bench("calls", |a| {
        let (mut top, mut function) = (a.create_label(), a.create_label());
        a.mov(ecx, N)?;
        a.set_label(&mut top)?;
        a.call(function)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()?;
        a.set_label(&mut function)?;
        a.push(rbx)?;
        a.mov(ebx, ecx)?;
        a.pop(rbx)?;
        a.ret()
    });
    bench("sse", |a| {
        let mut top = a.create_label();
        a.mov(ecx, N / 4)?;
        a.mov(rdi, 0x10_0000u64)?;
        a.set_label(&mut top)?;
        a.movups(xmm0, xmmword_ptr(rdi))?;
        a.paddd(xmm0, xmm1)?;
        a.movups(xmmword_ptr(rdi), xmm0)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.hlt()
    });
}
