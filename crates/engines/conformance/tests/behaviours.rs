//! What debuggers, drivers and self-changing programs rely on, on every engine. Most of it happens inside loops, so that an
//! engine that keeps translations has some in use when it does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use conformance::Kind;
use cpum::state::rflags;
use cpum::{CpuState, ForcedActions};
use em::{Engine, Exit};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use iem::testing::{Board, HANDLERS, Machine, TABLES};
use pgm::Pgm;
use vbox_types::{GuestPhys, VcpuId};

const CODE: u64 = 0x10_0000;
/// Where the programs count.
const COUNT: u64 = 0x20_0000;
const DATA: u64 = 0x21_0000;
/// Rounds of the loops.
const ROUNDS: u64 = 200;
/// Runs that take longer hang.
const PATIENCE: Duration = Duration::from_secs(30);

fn assemble(at: u64, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// A long-mode machine with tables, a handler for `vector`, and an engine.
struct Bench {
    machine: Machine,
    engine: Box<dyn Engine>,
}

impl Bench {
    fn new(kind: Kind, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let mut machine = Machine::long(CODE);
        machine.tables();
        machine.cpu.gpr[2] = 0;
        machine.put(CODE, &assemble(CODE, code));
        let engine = kind.engine(&machine.board.ctx, VcpuId(0)).unwrap();
        Self { machine, engine }
    }

    /// The handlers are 16 bytes apart: a jump leads to the code.
    fn handler(&mut self, vector: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        const PLACE: u64 = 0x18_0000;
        self.machine.put(PLACE, &assemble(PLACE, code));
        let at = HANDLERS + 16 * vector;
        self.machine.put(at, &assemble(at, |a| a.jmp(PLACE)));
    }

    fn run(&mut self) -> Exit {
        run_for(&mut *self.engine, &mut self.machine.cpu, &self.machine.board, 0)
    }

    fn run_to_halt(&mut self) {
        let exit = self.run();
        assert!(matches!(exit, Exit::Halt), "{exit:?} at {:#x}", self.machine.cpu.rip);
    }

    fn counted(&self) -> u64 {
        self.machine.u64_at(COUNT)
    }
}

/// Runs until the engine returns, for a limited time.
fn run_for(engine: &mut dyn Engine, cpu: &mut CpuState, board: &Board, id: usize) -> Exit {
    let link = board.ctx.links[id].clone();
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let late = receiver.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late {
            link.raise(ForcedActions::EM);
        }
    });
    let exit = engine.run(cpu);
    drop(sender);
    watch.join().unwrap();
    exit
}

/// Counts, and returns to where it came from.
fn count_and_return(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.inc(qword_ptr(COUNT))?;
    a.iretq()
}

#[test]
fn a_loop_is_single_stepped_and_goes_on_at_full_speed_afterwards() {
    for &kind in Kind::ALL {
        let mut b = Bench::new(kind, |a| {
            let (mut first, mut stepped, mut last) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(ecx, ROUNDS as i32)?;
            a.set_label(&mut first)?;
            a.add(rax, rcx)?;
            a.dec(ecx)?;
            a.jne(first)?;
            a.pushfq()?;
            a.or(qword_ptr(rsp), rflags::TF as i32)?;
            a.popfq()?;
            a.mov(ecx, ROUNDS as i32)?;
            a.set_label(&mut stepped)?;
            a.add(rax, rcx)?;
            a.dec(ecx)?;
            a.jne(stepped)?;
            a.pushfq()?;
            a.and(qword_ptr(rsp), !(rflags::TF as i32))?;
            a.popfq()?;
            a.mov(ecx, ROUNDS as i32)?;
            a.set_label(&mut last)?;
            a.add(rax, rcx)?;
            a.dec(ecx)?;
            a.jne(last)?;
            a.hlt()
        });
        b.handler(1, count_and_return);
        b.run_to_halt();
        // Behind MOV, three instructions a round, PUSHF, AND, and POPF, which still had the flag when it began.
        assert_eq!(b.counted(), 1 + 3 * ROUNDS + 3, "{kind:?}");
        assert_eq!(b.machine.cpu.gpr[0], 3 * ROUNDS * (ROUNDS + 1) / 2, "{kind:?}");
    }
}

#[test]
fn an_instruction_breakpoint_in_a_loop_hits_each_time_and_rf_lets_it_pass() {
    for &kind in Kind::ALL {
        let mut b = Bench::new(kind, |a| {
            let mut top = a.create_label();
            a.mov(ecx, ROUNDS as i32)?;
            a.set_label(&mut top)?;
            a.nop()?;
            a.add(rax, rcx)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        });
        // Behind MOV (5 bytes) and NOP.
        b.machine.cpu.dr[0] = CODE + 6;
        b.machine.cpu.dr7 = 0x402;
        b.handler(1, |a| {
            a.inc(qword_ptr(COUNT))?;
            a.or(qword_ptr(rsp + 16), rflags::RF as i32)?;
            a.iretq()
        });
        b.run_to_halt();
        assert_eq!(b.counted(), ROUNDS, "{kind:?}");
        assert_eq!(b.machine.cpu.gpr[0], ROUNDS * (ROUNDS + 1) / 2, "{kind:?}");
        assert_eq!(b.machine.cpu.dr6 & 0xf, 1, "{kind:?}");
    }
}

#[test]
fn watchpoints_trap_behind_the_accesses_that_they_name() {
    // Length 8 (2): writes (1), and reads and writes (3).
    for (condition, hits) in [(1u64, ROUNDS), (3, 2 * ROUNDS)] {
        for &kind in Kind::ALL {
            let mut b = Bench::new(kind, |a| {
                let (mut warm, mut top) = (a.create_label(), a.create_label());
                for (label, armed) in [(&mut warm, false), (&mut top, true)] {
                    if armed {
                        a.mov(rax, DATA)?;
                        a.mov(dr2, rax)?;
                        a.mov(rax, 0x400 | 1 << 5 | condition << 24 | 2 << 26)?;
                        a.mov(dr7, rax)?;
                    }
                    a.mov(ecx, ROUNDS as i32)?;
                    a.set_label(label)?;
                    a.mov(byte_ptr(DATA + 3), cl)?;
                    a.mov(rdx, qword_ptr(DATA))?;
                    a.mov(byte_ptr(DATA + 8), cl)?;
                    a.mov(rdx, qword_ptr(DATA + 16))?;
                    a.dec(ecx)?;
                    a.jne(*label)?;
                }
                a.hlt()
            });
            b.handler(1, count_and_return);
            b.run_to_halt();
            assert_eq!(b.counted(), hits, "{kind:?} condition {condition}");
            assert_eq!(b.machine.cpu.dr6 & 0xf, 4, "{kind:?}");
        }
    }
}

#[test]
fn sti_and_mov_ss_hold_interrupts_off_for_one_instruction() {
    for &kind in Kind::ALL {
        // The request is there all the time; the engine may return for it only behind the NOP.
        let mut b = Bench::new(kind, |a| {
            a.cli()?;
            a.mov(eax, 1)?;
            a.sti()?;
            a.nop()?;
            a.mov(eax, 2)?;
            a.hlt()
        });
        b.machine.board.ctx.links[0].raise(ForcedActions::INTERRUPT);
        assert!(matches!(b.run(), Exit::Attention), "{kind:?}");
        // CLI, MOV (5 bytes), STI, NOP.
        assert_eq!((b.machine.cpu.rip, b.machine.cpu.gpr[0]), (CODE + 8, 1), "{kind:?} STI");

        let mut b = Bench::new(kind, |a| {
            a.mov(ecx, ss)?;
            a.sti()?;
            a.mov(ss, ecx)?;
            a.nop()?;
            a.mov(eax, 2)?;
            a.hlt()
        });
        b.machine.board.ctx.links[0].raise(ForcedActions::INTERRUPT);
        assert!(matches!(b.run(), Exit::Attention), "{kind:?}");
        // MOV, STI, MOV, NOP: STI's shadow covers MOV SS, whose own covers NOP.
        assert_eq!(b.machine.cpu.rip, CODE + 6, "{kind:?} MOV SS");
    }
}

#[test]
fn repeated_instructions_go_on_after_a_page_fault_in_their_midst() {
    // The second page of the destination is not there until the handler puts it there: pages of 4 KiB from here on.
    const SOURCE: u64 = 0x22_0800;
    const TO: u64 = 0x24_0800;
    const LEN: u64 = 0x1800;
    for &kind in Kind::ALL {
        for words in [false, true] {
            let mut b = Bench::new(kind, |a| {
                a.mov(esi, SOURCE as i32)?;
                a.mov(edi, TO as i32)?;
                if words {
                    a.mov(ecx, (LEN / 8) as i32)?;
                    a.rep().movsq()?;
                } else {
                    a.mov(ecx, LEN as i32)?;
                    a.rep().movsb()?;
                }
                a.hlt()
            });
            let pte = small_pages(&mut b.machine, TO) + 8 * (TO >> 12 & 511);
            let missing = pte + 8;
            let entry = b.machine.u64_at(missing);
            b.machine.put(missing, &(entry & !1).to_le_bytes());
            b.handler(14, |a| {
                a.mov(qword_ptr(COUNT + 8), rcx)?;
                a.or(qword_ptr(missing), 1)?;
                a.inc(qword_ptr(COUNT))?;
                a.add(rsp, 8)?;
                a.iretq()
            });
            let data: Vec<u8> = (0..LEN).map(|n| (n * 7 + n / 251) as u8).collect();
            b.machine.put(SOURCE, &data);
            b.run_to_halt();
            assert_eq!(b.counted(), 1, "{kind:?}");
            let left = if words { (LEN - 0x800) / 8 } else { LEN - 0x800 };
            assert_eq!(b.machine.u64_at(COUNT + 8), left, "{kind:?}: RCX tells how far it came");
            let mut out = vec![0; LEN as usize];
            b.machine.board.ram.read(TO, &mut out);
            assert!(out == data, "{kind:?}");
        }
    }
}

/// Maps the 2 MiB around `linear` by small pages, to themselves; gives the address of the table.
fn small_pages(machine: &mut Machine, linear: u64) -> u64 {
    const TABLE: u64 = 0x1f_0000;
    let base = linear & !0x1f_ffff;
    for n in 0..512 {
        machine.put(TABLE + 8 * n, &((base + n * 0x1000) | 7).to_le_bytes());
    }
    machine.put(TABLES + 0x2000 + 8 * (linear >> 21), &(TABLE | 7).to_le_bytes());
    TABLE
}

#[test]
fn an_instruction_across_pages_follows_the_second_page() {
    // The immediate of MOV EAX lies in a page that is mapped elsewhere in the loop's second half.
    const AT: u64 = 0x28_0ffe;
    for &kind in Kind::ALL {
        let mut b = Bench::new(kind, |a| {
            let mut top = a.create_label();
            a.mov(ecx, ROUNDS as i32)?;
            a.mov(rbx, AT)?;
            a.set_label(&mut top)?;
            a.call(rbx)?;
            a.add(rdx, rax)?;
            a.cmp(ecx, (ROUNDS / 2 + 1) as i32)?;
            let mut stay = a.create_label();
            a.jne(stay)?;
            a.mov(rax, qword_ptr(COUNT + 0x100))?;
            a.mov(rsi, qword_ptr(COUNT + 0x108))?;
            a.mov(qword_ptr(rsi), rax)?;
            a.invlpg(byte_ptr(AT + 2))?;
            a.set_label(&mut stay)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        });
        let table = small_pages(&mut b.machine, AT);
        // mov eax, imm32; ret: opcode and a byte of the immediate in the first page.
        b.machine.put(AT, &[0xb8, 5, 0, 0, 0, 0xc3]);
        b.machine.put(0x2a_0000, &[1, 0, 0, 0xc3]);
        b.machine.put(COUNT + 0x100, &0x2a_0007u64.to_le_bytes());
        b.machine.put(COUNT + 0x108, &(table + 8 * ((AT + 2) >> 12 & 511)).to_le_bytes());
        b.run_to_halt();
        assert_eq!(b.machine.cpu.gpr[2], ROUNDS / 2 * 5 + ROUNDS / 2 * 0x105, "{kind:?}");
    }
}

#[test]
fn the_a20_gate_moves_accesses_and_code_of_a_running_loop() {
    // Port 0x92 as on a PC, bit 1.
    struct Gate(Arc<Pgm>);
    impl pdm::PortIo for Gate {
        fn port_read(&mut self, _: vbox_types::Port, _: pdm::Width) -> u32 {
            u32::from(self.0.a20()) << 1
        }
        fn port_write(&mut self, _: vbox_types::Port, _: pdm::Width, value: u32) {
            self.0.set_a20(value & 2 != 0);
        }
    }
    const LOW: u64 = 0x6_0000;
    const HIGH: u64 = LOW | 1 << 20;
    for &kind in Kind::ALL {
        let mut machine = Machine::long(0x5_0000);
        machine.tables();
        let code = assemble(0x5_0000, |a| {
            let (mut top, mut inner) = (a.create_label(), a.create_label());
            a.mov(ebp, 4)?;
            a.mov(rbx, HIGH + 0x800)?;
            a.set_label(&mut top)?;
            a.mov(ecx, ROUNDS as i32)?;
            a.set_label(&mut inner)?;
            a.inc(dword_ptr(HIGH))?;
            a.call(rbx)?;
            a.add(edi, eax)?;
            a.dec(ecx)?;
            a.jne(inner)?;
            a.in_(al, 0x92)?;
            a.xor(al, 2)?;
            a.out(0x92, al)?;
            a.dec(ebp)?;
            a.jne(top)?;
            a.hlt()
        });
        machine.put(0x5_0000, &code);
        machine.put(LOW + 0x800, &[0xb8, 1, 0, 0, 0, 0xc3]);
        machine.put(HIGH + 0x800, &[0xb8, 2, 0, 0, 0, 0xc3]);
        let gate = Arc::new(parking_lot::Mutex::new(Gate(machine.board.pgm.clone())));
        machine.board.iom.register(vbox_types::Port(0x92), 1, pdm::Width::Byte, gate);
        let engine = kind.engine(&machine.board.ctx, VcpuId(0)).unwrap();
        let mut b = Bench { machine, engine };
        b.run_to_halt();
        let rounds = ROUNDS as u32;
        assert_eq!((b.machine.u32_at(LOW), b.machine.u32_at(HIGH)), (2 * rounds, 2 * rounds), "{kind:?}");
        assert_eq!(b.machine.cpu.gpr[7], 6 * ROUNDS, "{kind:?}");
    }
}

#[test]
fn a_block_that_writes_its_own_next_instruction_runs_what_it_wrote() {
    for &kind in Kind::ALL {
        let mut b = Bench::new(kind, |a| {
            let (mut top, mut patched) = (a.create_label(), a.create_label());
            a.mov(ecx, ROUNDS as i32)?;
            a.set_label(&mut top)?;
            a.lea(rsi, ptr(patched))?;
            // The immediate behind the opcode.
            a.mov(dword_ptr(rsi + 1), ecx)?;
            a.set_label(&mut patched)?;
            a.mov(eax, 0x7777_7777)?;
            a.add(rdx, rax)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        });
        b.run_to_halt();
        assert_eq!(b.machine.cpu.gpr[2], ROUNDS * (ROUNDS + 1) / 2, "{kind:?}");
    }
}

/// A loop that ends once its own comparison's immediate is zero. It makes no exits, and its code is in one page.
fn endless(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.inc(qword_ptr(COUNT))?;
    a.mov(eax, 1)?;
    a.test(eax, eax)?;
    a.jne(top)?;
    a.hlt()
}

/// Where [`endless`] has its immediate: behind INC with an absolute address and the opcode.
fn immediate() -> u64 {
    let code = assemble(CODE, endless);
    let at = code.windows(5).position(|w| w == [0xb8, 1, 0, 0, 0]).unwrap();
    CODE + at as u64 + 1
}

#[test]
fn a_device_that_writes_over_a_loop_is_noticed_while_the_loop_runs() {
    for &kind in Kind::ALL {
        let mut b = Bench::new(kind, endless);
        let pgm = b.machine.board.pgm.clone();
        let ram = b.machine.board.ram.clone();
        let device = std::thread::spawn(move || {
            let mut count = [0; 8];
            while u64::from_le_bytes(count) < 100_000 {
                std::thread::sleep(Duration::from_millis(1));
                ram.read(COUNT, &mut count);
            }
            let began = Instant::now();
            pgm.write(GuestPhys(immediate()), &[0]);
            began
        });
        let exit = b.run();
        let took = device.join().unwrap().elapsed();
        assert!(matches!(exit, Exit::Halt), "{kind:?}: {exit:?}, the loop goes on");
        assert!(took < PATIENCE / 2, "{kind:?}: {took:?}");
    }
}

#[test]
fn another_cpu_that_writes_over_a_loop_is_noticed_while_the_loop_runs() {
    for &kind in Kind::ALL {
        let first = Machine::long(CODE);
        let board = Board::new(2, 4 << 20);
        let mut image = vec![0; 0x8000];
        first.board.ram.read(0, &mut image);
        board.ram.write(0, &image);
        board.ram.write(CODE, &assemble(CODE, endless));
        const PATCHER: u64 = 0x12_0000;
        let patcher = assemble(PATCHER, |a| {
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(qword_ptr(COUNT), 100_000)?;
            a.jb(wait)?;
            a.mov(byte_ptr(immediate()), 0)?;
            a.hlt()
        });
        board.ram.write(PATCHER, &patcher);
        let board = Arc::new(board);
        let threads: Vec<_> = [CODE, PATCHER]
            .into_iter()
            .enumerate()
            .map(|(id, rip)| {
                let mut engine = kind.engine(&board.ctx, VcpuId(id as u32)).unwrap();
                let mut cpu = first.cpu.clone();
                (cpu.id, cpu.rip) = (id as u32, rip);
                let board = board.clone();
                std::thread::spawn(move || run_for(&mut *engine, &mut cpu, &board, id))
            })
            .collect();
        for thread in threads {
            let exit = thread.join().unwrap();
            assert!(matches!(exit, Exit::Halt), "{kind:?}: {exit:?}, the loop goes on");
        }
    }
}
