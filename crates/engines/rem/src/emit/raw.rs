//! Instructions whose bytes can be taken as they are, but for the memory operand: that costs a tenth of encoding them anew.

use iced_x86::{Instruction, OpKind, Register};

use super::Emitter;
use crate::asm::M;
use crate::plan::{Item, high_number};

/// The parts of an instruction of one- to three-byte opcodes of the legacy maps, with a memory operand.
struct Parts<'a> {
    /// Those prefixes that mean something without the guest's segments.
    prefixes: [u8; 4],
    count: usize,
    rex: u8,
    opcode: &'a [u8],
    reg: u8,
    immediate: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(code: &'a [u8], unlocked: bool) -> Option<Self> {
        let (mut prefixes, mut count, mut at) = ([0; 4], 0, 0);
        loop {
            match *code.get(at)? {
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0xf0 if unlocked => {}
                p @ (0x66 | 0xf0 | 0xf2 | 0xf3) => {
                    *prefixes.get_mut(count)? = p;
                    count += 1;
                }
                _ => break,
            }
            at += 1;
        }
        let mut rex = 0;
        if code.get(at)? & 0xf0 == 0x40 {
            rex = code[at];
            at += 1;
        }
        let start = at;
        at += match code.get(at..)? {
            [0x0f, 0x38 | 0x3a, ..] => 3,
            [0x0f, ..] => 2,
            // VEX, EVEX, address size.
            [0xc4 | 0xc5 | 0x62 | 0x67, ..] => return None,
            // No ModRM byte.
            [0xa0..=0xa3, ..] => return None,
            _ => 1,
        };
        let opcode = code.get(start..at)?;
        let modrm = *code.get(at)?;
        at += 1;
        let (mode, rm) = (modrm >> 6, modrm & 7);
        let mut base = rm;
        if rm == 4 {
            base = code.get(at)? & 7;
            at += 1;
        }
        at += match mode {
            0 if base == 5 => 4,
            0 => 0,
            1 => 1,
            2 => 4,
            _ => return None,
        };
        let immediate = code.get(at..)?;
        Some(Self { prefixes, count, rex, opcode, reg: (rex & 4) << 1 | modrm >> 3 & 7, immediate })
    }
}

/// Whether all general registers among the operands are in the host registers of the same numbers.
fn at_home(insn: &Instruction) -> bool {
    (0..insn.op_count()).all(|i| {
        let register = insn.op_register(i);
        insn.op_kind(i) != OpKind::Register
            || !register.is_gpr()
            || high_number(register).is_none() && register.full_register() != Register::RSP
    })
}

impl Emitter<'_> {
    /// Takes an instruction of 64-bit code over as it stands, with `m` for its memory operand; false if that cannot be done.
    pub(super) fn copy_raw(&mut self, item: &Item, m: Option<M>, unlocked: bool) -> bool {
        if !self.mode.long || item.renamed || !at_home(&item.insn) {
            return false;
        }
        let from = usize::from(item.offset);
        let Some(code) = self.code.get(from..from + item.insn.len()) else { return false };
        match m {
            None if unlocked => false,
            None => {
                self.hot.bytes(code);
                true
            }
            Some(m) => {
                let Some(parts) = Parts::of(code, unlocked) else { return false };
                self.hot.bytes(&parts.prefixes[..parts.count]);
                // The operand has a register from r8 on, so that there is a REX prefix as byte registers may want it.
                self.hot.rm(parts.rex & 8 != 0, None, parts.opcode, parts.reg, m);
                self.hot.bytes(parts.immediate);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_opcode_and_immediate_are_told_apart() {
        // lock add word ptr gs:[r13 + r9 * 2 + 0x11223344], 0x5566
        let code = [0x65, 0xf0, 0x66, 0x43, 0x81, 0x84, 0x4d, 0x44, 0x33, 0x22, 0x11, 0x66, 0x55];
        let parts = Parts::of(&code, true).unwrap();
        assert_eq!(&parts.prefixes[..parts.count], [0x66]);
        assert_eq!((parts.rex, parts.opcode, parts.reg), (0x43, &[0x81][..], 0));
        assert_eq!(parts.immediate, [0x66, 0x55]);
        // movzx r12d, byte ptr [rip + 1]
        let parts = Parts::of(&[0x44, 0x0f, 0xb6, 0x25, 1, 0, 0, 0], false).unwrap();
        assert_eq!((parts.opcode, parts.reg, parts.immediate), (&[0x0f, 0xb6][..], 12, &[][..]));
        // VEX, and an operand that is a register.
        assert!(Parts::of(&[0xc5, 0xf8, 0x10, 0x00], false).is_none());
        assert!(Parts::of(&[0x01, 0xc0], false).is_none());
    }
}
