//! Instructions that only move or set control state: done here, without the host's unit.

use cpum::CpuState;
use cpum::state::gpr;
use iced_x86::{Instruction, Mnemonic};

use super::x87::{self, Format};
use super::{MXCSR_MASK, area, mxcsr, set_mxcsr, set_u16, u16_at, xsave};
use crate::Fault;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// WAIT, and 8087 and 80287 instructions that later units ignore.
    Nothing,
    Init,
    ClearExceptions,
    StoreStatusAx,
    StoreStatus,
    StoreControl,
    LoadControl,
    StoreEnvironment {
        wide: bool,
    },
    LoadEnvironment {
        wide: bool,
    },
    Save {
        wide: bool,
    },
    Restore {
        wide: bool,
    },
    /// `wide`: with REX.W, 64-bit pointers.
    Fxsave {
        wide: bool,
    },
    Fxrstor {
        wide: bool,
    },
    LoadMxcsr,
    StoreMxcsr,
    ZeroUpper,
    ZeroAll,
    Emms,
}

impl Action {
    pub(super) fn of(insn: &Instruction) -> Option<Self> {
        use Mnemonic::*;
        let size = insn.memory_size().size();
        Some(match insn.mnemonic() {
            Wait | Fneni | Fndisi | Fnsetpm => Self::Nothing,
            Fninit => Self::Init,
            Fnclex => Self::ClearExceptions,
            Fnstsw if size == 0 => Self::StoreStatusAx,
            Fnstsw => Self::StoreStatus,
            Fnstcw => Self::StoreControl,
            Fldcw => Self::LoadControl,
            Fnstenv => Self::StoreEnvironment { wide: size == 28 },
            Fldenv => Self::LoadEnvironment { wide: size == 28 },
            Fnsave => Self::Save { wide: size == 108 },
            Frstor => Self::Restore { wide: size == 108 },
            Fxsave => Self::Fxsave { wide: false },
            Fxsave64 => Self::Fxsave { wide: true },
            Fxrstor => Self::Fxrstor { wide: false },
            Fxrstor64 => Self::Fxrstor { wide: true },
            Ldmxcsr | Vldmxcsr => Self::LoadMxcsr,
            Stmxcsr | Vstmxcsr => Self::StoreMxcsr,
            Vzeroupper => Self::ZeroUpper,
            Vzeroall => Self::ZeroAll,
            Emms => Self::Emms,
            _ => return None,
        })
    }
}

pub(super) fn execute(action: Action, cpu: &mut CpuState, mem: &mut [u8]) -> Result<(), Fault> {
    let long = cpu.is_64bit();
    match action {
        Action::Nothing => {}
        Action::Init => x87::init(&mut cpu.xsave),
        Action::ClearExceptions => x87::clear_exceptions(&mut cpu.xsave),
        Action::StoreStatusAx => {
            cpu.gpr[gpr::RAX] = (cpu.gpr[gpr::RAX] & !0xffff) | u64::from(u16_at(&cpu.xsave, area::FSW));
        }
        Action::StoreStatus => mem[..2].copy_from_slice(&cpu.xsave.0[area::FSW..area::FSW + 2]),
        Action::StoreControl => mem[..2].copy_from_slice(&cpu.xsave.0[area::FCW..area::FCW + 2]),
        Action::LoadControl => x87::set_control(&mut cpu.xsave, u16::from_le_bytes([mem[0], mem[1]])),
        Action::StoreEnvironment { wide } => {
            x87::store_environment(&cpu.xsave, Format::new(cpu, wide), mem);
            // All exceptions are masked afterwards.
            let control = u16_at(&cpu.xsave, area::FCW);
            x87::set_control(&mut cpu.xsave, control | 0x3f);
        }
        Action::LoadEnvironment { wide } => {
            let format = Format::new(cpu, wide);
            x87::load_environment(&mut cpu.xsave, format, mem);
        }
        Action::Save { wide } => {
            let format = Format::new(cpu, wide);
            x87::store_environment(&cpu.xsave, format, mem);
            x87::store_registers(&cpu.xsave, &mut mem[format.len()..]);
            x87::init(&mut cpu.xsave);
        }
        Action::Restore { wide } => {
            let format = Format::new(cpu, wide);
            x87::load_environment(&mut cpu.xsave, format, mem);
            x87::load_registers(&mut cpu.xsave, &mem[format.len()..]);
        }
        Action::Fxsave { wide } => {
            xsave::store_x87(&cpu.xsave, wide, mem);
            xsave::store_mxcsr(&cpu.xsave, mem);
            let end = xsave::xmm_end(long);
            mem[area::XMM..end].copy_from_slice(&cpu.xsave.0[area::XMM..end]);
        }
        Action::Fxrstor { wide } => {
            let value = xsave::image_mxcsr(mem);
            if value & !MXCSR_MASK != 0 {
                return Err(Fault::GP0);
            }
            xsave::load_x87(&mut cpu.xsave, wide, mem);
            set_mxcsr(&mut cpu.xsave, value);
            let end = xsave::xmm_end(long);
            cpu.xsave.0[area::XMM..end].copy_from_slice(&mem[area::XMM..end]);
        }
        Action::LoadMxcsr => {
            let value = u32::from_le_bytes([mem[0], mem[1], mem[2], mem[3]]);
            if value & !MXCSR_MASK != 0 {
                return Err(Fault::GP0);
            }
            set_mxcsr(&mut cpu.xsave, value);
        }
        Action::StoreMxcsr => mem[..4].copy_from_slice(&mxcsr(&cpu.xsave).to_le_bytes()),
        Action::ZeroUpper => {
            let count = if long { 16 } else { 8 };
            cpu.xsave.0[area::YMM..area::YMM + 16 * count].fill(0);
        }
        Action::ZeroAll => {
            let count = if long { 16 } else { 8 };
            cpu.xsave.0[area::YMM..area::YMM + 16 * count].fill(0);
            cpu.xsave.0[area::XMM..area::XMM + 16 * count].fill(0);
        }
        Action::Emms => {
            x87::enter_mmx(cpu);
            set_u16(&mut cpu.xsave, area::FTW, 0);
        }
    }
    Ok(())
}
