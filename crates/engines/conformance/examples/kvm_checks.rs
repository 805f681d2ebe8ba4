//! What KVM alone does, on a host that has it: it notes which pages a guest has written, and notes what is written while nobody asks.
//!
//! `cargo run --release -p conformance --example kvm_checks`. Exit status 1 if something is not as it should be, or there is no usable KVM.

use std::process::ExitCode;

use conformance::Kind;
use em::{Engine, Exit};
use iced_x86::code_asm::*;
use iem::testing::Machine;
use vbox_types::VcpuId;

const CODE: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;
/// The pages that the guest may write, and those that it leaves alone.
const WRITTEN: [u64; 3] = [0x20_0000, 0x20_3000, 0x2f_f000];
const ALONE: [u64; 3] = [0x20_1000, 0x20_2000, 0x2f_e000];

struct Rig {
    machine: Machine,
    engine: Box<dyn Engine>,
}

impl Rig {
    /// Has guest code write a byte of each page.
    fn write(&mut self, pages: &[u64]) -> Result<(), String> {
        let mut a = CodeAssembler::new(64).map_err(|e| e.to_string())?;
        for &page in pages {
            a.mov(byte_ptr(page + 0x123), 0x5a).map_err(|e| e.to_string())?;
        }
        a.hlt().map_err(|e| e.to_string())?;
        self.machine.put(CODE, &a.assemble(CODE).map_err(|e| e.to_string())?);
        let cpu = &mut self.machine.cpu;
        (cpu.rip, cpu.activity) = (CODE, cpum::Activity::Running);
        self.engine.state_changed(cpu);
        let exit = self.engine.run(cpu);
        self.engine.complete(cpu);
        if matches!(exit, Exit::Halt) { Ok(()) } else { Err(format!("{exit:?} at {:#x}", cpu.rip)) }
    }

    /// Which of the pages have been written since the last call.
    fn dirty(&self, pages: &[u64]) -> Vec<u64> {
        let board = &self.machine.board;
        let bits = board.pgm.take_dirty(None, &board.ram);
        let is_set = |page: u64| bits[(page / PAGE / 64) as usize] >> (page / PAGE % 64) & 1 != 0;
        pages.iter().copied().filter(|page| is_set(*page)).collect()
    }
}

fn check(what: &str, found: &[u64], wanted: &[u64]) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: {found:x?}, not {wanted:x?}")) }
}

fn dirty_pages() -> Result<(), String> {
    let mut machine = Machine::long(CODE);
    machine.tables();
    let engine = Kind::Kvm.engine(&machine.board.ctx, VcpuId(0)).map_err(|e| e.to_string())?;
    let mut rig = Rig { machine, engine };
    let all: Vec<u64> = WRITTEN.into_iter().chain(ALONE).collect();
    rig.write(&[])?;
    check("what was written before anybody asked is not known", &rig.dirty(&all), &all)?;
    rig.write(&WRITTEN)?;
    check("what the guest wrote", &rig.dirty(&all), &WRITTEN)?;
    rig.write(&[])?;
    check("nothing new", &rig.dirty(&all), &[])?;
    rig.write(&WRITTEN[1..2])?;
    rig.write(&WRITTEN[2..])?;
    check("two runs between two looks", &rig.dirty(&all), &WRITTEN[1..])?;
    // The host's own writes count, too.
    rig.machine.put(ALONE[0], &[1]);
    check("what the host wrote", &rig.dirty(&all), &ALONE[..1])?;
    let board = &rig.machine.board;
    board.pgm.forget_dirty(&board.ram);
    check("after a time when nobody wanted to know", &rig.dirty(&all), &all)?;
    rig.write(&WRITTEN[..1])?;
    // Another engine goes on: nobody can ask KVM any more.
    rig.engine = Kind::Interpreter.engine(&rig.machine.board.ctx, VcpuId(0)).map_err(|e| e.to_string())?;
    let left = rig.dirty(&all);
    if left.contains(&WRITTEN[0]) {
        Ok(())
    } else {
        Err(format!("KVM is gone, and with it a page: {left:x?}"))
    }
}

fn main() -> ExitCode {
    match dirty_pages() {
        Ok(()) => {
            println!("KVM's dirty pages are what guests wrote");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("KVM's dirty pages: {why}");
            ExitCode::FAILURE
        }
    }
}
