//! VMCALL and VMMCALL lead to the paravirtualization provider, or fault.

use std::sync::Arc;

use cpum::CpuState;
use cpum::state::gpr;
use em::VmContext;
use iem::Iem;
use iem::testing::*;
use vbox_types::VcpuId;

/// Adds 1 to RBX per call, and serves one register.
struct Provider;

impl em::Gim for Provider {
    fn read_msr(&self, _: VcpuId, msr: u32) -> Option<u64> {
        (msr == 0x4b56_4d01).then_some(0x1234)
    }
    fn write_msr(&self, _: &CpuState, _: u32, _: u64) -> bool {
        false
    }
    fn hypercall(&self, cpu: &mut CpuState) -> bool {
        cpu.gpr[gpr::RBX] += 1;
        true
    }
    fn tsc_moved(&self, _: &CpuState) {}
    fn about_to_run(&self, _: VcpuId) {}
}

const CODE: u64 = 0x2_0000;
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

fn machine(code: &[u8]) -> Machine {
    let mut m = Machine::long(CODE);
    m.tables();
    m.put(CODE, code);
    m
}

/// Gives the machine a provider.
fn provided(mut m: Machine) -> Machine {
    let old = &m.board.ctx;
    let ctx = Arc::new(VmContext {
        pgm: old.pgm.clone(),
        iom: old.iom.clone(),
        irq: old.irq.clone(),
        clock: old.clock.clone(),
        tsc_frequency: old.tsc_frequency,
        links: old.links.clone(),
        cpuid: old.cpuid.clone(),
        gim: Some(Arc::new(Provider)),
    });
    m.iem = Iem::new(ctx, VcpuId(0)).expect("execution unit");
    m
}

#[test]
fn either_call_reaches_the_provider_and_execution_goes_on() {
    let mut m = provided(machine(&[VMCALL.as_slice(), &VMMCALL, &[0xf4]].concat()));
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[gpr::RBX], m.cpu.rip), (2, CODE + 7));
}

#[test]
fn without_a_provider_the_calls_are_undefined() {
    for call in [VMCALL, VMMCALL] {
        let mut m = machine(&call);
        m.run_to_halt();
        assert_eq!(m.halted_in_handler(), 6);
    }
}

#[test]
fn the_providers_registers_are_read_and_others_fault() {
    let rdmsr = [0x0f, 0x32, 0xf4];
    let mut m = provided(machine(&rdmsr));
    m.cpu.gpr[gpr::RCX] = 0x4b56_4d01;
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[gpr::RAX], m.cpu.rip), (0x1234, CODE + 3));
    let mut m = provided(machine(&rdmsr));
    m.cpu.gpr[gpr::RCX] = 0x4b56_4d02;
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 13);
}
