//! Instructions of the x87, MMX, SSE and AVX unit: addresses and memory here, execution in [`crate::unit`].

use cpum::CpuState;

use crate::core::Core;
use crate::op::{Full, Op, ea, linear_of};
use crate::unit::{self, Class, Kind};
use crate::{Fault, GuestMemory};

/// Room for an operand, aligned for the unit.
#[repr(C, align(64))]
struct Buffer<const N: usize>([u8; N]);

fn class(op: &Op) -> Result<&Class, Fault> {
    op.full.as_ref().and_then(|f| f.class.as_ref()).ok_or(Fault::UD)
}

/// Runs `action` with the unit taken out of the core, which serves as its memory meanwhile.
#[inline(always)]
fn with_unit(
    core: &mut Core,
    action: impl FnOnce(&mut unit::Unit, &mut Core) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let Some(mut unit) = core.unit.take() else { return Err(Fault::UD) };
    let result = action(&mut unit, core);
    core.unit = Some(unit);
    result
}

/// An instruction without memory operand.
pub(crate) fn registers(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    class(op)?.check(cpu)?;
    let Some(full) = &op.full else { return Err(Fault::UD) };
    core.sync_flags(cpu);
    let Some(unit) = &mut core.unit else { return Err(Fault::UD) };
    unit.execute(&full.stub, &full.insn, cpu, &mut [], 0)
}

/// An instruction with one memory operand of up to `N` bytes.
pub(crate) fn operand<const N: usize>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let class = class(op)?;
    class.check(cpu)?;
    let Some(full) = &op.full else { return Err(Fault::UD) };
    let size = usize::from(class.size).min(N);
    let offset = ea(cpu, op);
    core.sync_flags(cpu);
    let mut buffer = Buffer([0u8; N]);
    let bytes = &mut buffer.0[..size];
    if class.store_last {
        let tags = unit::tags(cpu);
        execute(core, cpu, full, bytes, offset)?;
        let result = locate(core, cpu, op, class, offset).and_then(|at| write(core, cpu, at, bytes));
        if result.is_err() {
            unit::set_tags(cpu, tags);
        }
        return result;
    }
    let at = match locate(core, cpu, op, class, offset) {
        Err(fault) if class.kind == Kind::X87 && class.access.writes() && !unit::is_amd() => {
            return store_nothing(core, cpu, full, bytes, offset).ok_or(fault);
        }
        located => located?,
    };
    if class.access.reads() {
        read(core, cpu, at, bytes)?;
    }
    execute(core, cpu, full, bytes, offset)?;
    if class.access.writes() {
        write(core, cpu, at, bytes)?;
    }
    Ok(())
}

/// An x87 store to where it faults: with an unmasked exception nothing may be stored, and Intel's CPUs do not look there then.
#[cold]
fn store_nothing(
    core: &mut Core,
    cpu: &mut CpuState,
    full: &Full,
    bytes: &mut [u8],
    offset: u64,
) -> Option<()> {
    let mut after = cpu.clone();
    execute(core, &mut after, full, bytes, offset).ok()?;
    unit::stores_nothing(&after).then(|| *cpu = after)
}

#[inline(always)]
fn execute(
    core: &mut Core,
    cpu: &mut CpuState,
    full: &Full,
    bytes: &mut [u8],
    offset: u64,
) -> Result<(), Fault> {
    let Some(unit) = &mut core.unit else { return Err(Fault::UD) };
    unit.execute(&full.stub, &full.insn, cpu, bytes, offset)
}

/// The linear address of the operand at `offset` in its segment. If it is written, it can be written.
#[inline(always)]
fn locate(core: &mut Core, cpu: &CpuState, op: &Op, class: &Class, offset: u64) -> Result<u64, Fault> {
    let size = u64::from(class.size);
    let at = linear_of(cpu, op, offset, size.max(1), class.access.writes())?;
    if class.align > 1 && at % u64::from(class.align) != 0 {
        return Err(Fault::GP0);
    }
    if class.access.writes() && !core.writable(at, size) {
        core.probe_write(cpu, at, size as u32)?;
    }
    Ok(at)
}

/// An instruction that accesses memory piece by piece.
pub(crate) fn pieces(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    class(op)?.check(cpu)?;
    let Some(full) = &op.full else { return Err(Fault::UD) };
    core.sync_flags(cpu);
    let offset = ea(cpu, op);
    with_unit(core, |unit, core| unit.execute_memory(&full.insn, cpu, core, offset))
}

#[inline(always)]
fn read(core: &mut Core, cpu: &CpuState, at: u64, out: &mut [u8]) -> Result<(), Fault> {
    match out.len() {
        4 => out.copy_from_slice(&core.read::<u32>(cpu, at)?.to_le_bytes()),
        n if n % 8 == 0 => {
            for (i, part) in out.chunks_exact_mut(8).enumerate() {
                let v = core.read::<u64>(cpu, at.wrapping_add(8 * i as u64))?;
                part.copy_from_slice(&v.to_le_bytes());
            }
        }
        _ => core.read_bytes(cpu, at, out)?,
    }
    Ok(())
}

/// Writes what was probed before.
#[inline(always)]
fn write(core: &mut Core, cpu: &CpuState, at: u64, data: &[u8]) -> Result<(), Fault> {
    if let Ok(bytes) = <[u8; 4]>::try_from(data) {
        return core.write(cpu, at, u32::from_le_bytes(bytes));
    }
    if !data.len().is_multiple_of(8) {
        return core.write_bytes(cpu, at, data);
    }
    for (i, part) in data.chunks_exact(8).enumerate() {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(part);
        core.write(cpu, at.wrapping_add(8 * i as u64), u64::from_le_bytes(bytes))?;
    }
    Ok(())
}
