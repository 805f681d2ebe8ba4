//! Port input and output, with the permission checks.

use cpum::CpuState;
use cpum::state::{gpr, rflags};
use pdm::Width;
use vbox_types::Port;

use crate::core::Core;
use crate::op::{Op, reg, set_reg};
use crate::tlb::Cell;
use crate::{Fault, debug};

/// Checks I/O privilege: IOPL, else the bitmap of the task state segment (Intel SDM volume 1, 19.5).
pub(crate) fn check(core: &mut Core, cpu: &CpuState, port: u16, size: usize) -> Result<(), Fault> {
    let v86 = cpu.rflags & rflags::VM != 0;
    let iopl = (cpu.rflags & rflags::IOPL) >> 12;
    if cpu.cr0 & cpum::state::cr0::PE != 0 && (v86 || u64::from(cpu.cpl()) > iopl) {
        // Only 32- and 64-bit task state segments have a bitmap.
        if cpu.tr.attr.unusable() || cpu.tr.attr.kind() & !2 != 9 || cpu.tr.limit < 0x67 {
            return Err(Fault::GP0);
        }
        let map: u16 = core.read_system(cpu, cpu.tr.base.wrapping_add(0x66))?;
        let at = u64::from(map) + u64::from(port) / 8;
        if at + 1 > cpu.tr.limit.into() {
            return Err(Fault::GP0);
        }
        let bits: u16 = core.read_system(cpu, cpu.tr.base.wrapping_add(at))?;
        if bits >> (port & 7) & ((1 << size) - 1) != 0 {
            return Err(Fault::GP0);
        }
    }
    core.breakpoints |= debug::match_io(cpu, port.into(), size as u64);
    Ok(())
}

fn width(size: usize) -> Width {
    match size {
        1 => Width::Byte,
        2 => Width::Word,
        _ => Width::Dword,
    }
}

pub(crate) fn port_read(core: &mut Core, port: u16, size: usize) -> u32 {
    core.stop = true;
    core.ctx.iom.read(Port(port), width(size))
}

pub(crate) fn port_write(core: &mut Core, port: u16, size: usize, value: u32) {
    core.stop = true;
    core.ctx.iom.write(Port(port), width(size), value);
}

pub(crate) fn port_read_string(core: &mut Core, port: u16, size: usize, out: &mut [u8]) {
    core.stop = true;
    core.ctx.iom.read_string(Port(port), width(size), out);
}

pub(crate) fn port_write_string(core: &mut Core, port: u16, size: usize, data: &[u8]) {
    core.stop = true;
    core.ctx.iom.write_string(Port(port), width(size), data);
}

/// IN: the port is in DX, or in `imm` if `IMM`.
pub(crate) fn input<const IMM: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let port = if IMM { op.imm as u8 as u16 } else { cpu.gpr[gpr::RDX] as u16 };
    check(core, cpu, port, T::BYTES)?;
    let v = port_read(core, port, T::BYTES);
    set_reg(cpu, 0, T::from_u64(v.into()));
    Ok(())
}

/// OUT.
pub(crate) fn output<const IMM: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let port = if IMM { op.imm as u8 as u16 } else { cpu.gpr[gpr::RDX] as u16 };
    check(core, cpu, port, T::BYTES)?;
    let v = reg::<T>(cpu, 0);
    port_write(core, port, T::BYTES, v.to_u64() as u32);
    Ok(())
}
