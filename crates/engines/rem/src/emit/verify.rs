//! Blocks of pages that are written all the time: instead of having writes to the page noticed, they compare their bytes
//! with those they were made from whenever they are entered, and read immediate operands from guest memory when they run.

use iced_x86::{Mnemonic, OpKind, Register};

use super::{Cold, Emitter, Flags, Sites, home};
use crate::asm::{Alu, M, cc, r};
use crate::context::off;
use crate::plan::{Item, high_number};
use crate::thunks::reason;

/// What such a block checks.
pub(crate) struct Verify {
    /// Bytes that must stand at offsets in the page.
    pub(crate) fixed: Vec<(u16, Vec<u8>)>,
    /// Address of the page's counter of entries left.
    pub(crate) counter: u64,
    /// The block's number.
    pub(crate) block: u32,
}

/// Where an immediate operand stands: offset in the page, and size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Immediate {
    pub(crate) offset: u16,
    pub(crate) size: u16,
}

/// Whether the instruction can read its immediate operand, of 4 or 8 bytes, from memory.
pub(crate) fn reads_immediate(item: &Item) -> bool {
    use Mnemonic::*;
    let insn = &item.insn;
    insn.op_count() == 2
        && insn.op_kind(0) == OpKind::Register
        && insn.op_register(0).is_gpr()
        && insn.op_register(0).size() >= 4
        // How RSP changes is planned for.
        && insn.op_register(0).full_register() != Register::RSP
        && high_number(insn.op_register(0)).is_none()
        && matches!(insn.op_kind(1), OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64)
        && matches!(insn.mnemonic(), Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Mov | Test)
}

impl Emitter<'_> {
    /// Makes sure that the guest's code is still what was translated.
    pub(super) fn verify(&mut self, verify: &Verify, start: u16) {
        self.hot.save_flags(r::S14, off::FLAGS);
        self.constant(r::S15, self.page);
        let mut stale = Sites::new();
        for (offset, bytes) in &verify.fixed {
            let mut at = i32::from(*offset);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let m = M::At(r::S15, at);
                let size = if rest.len() >= 8 { 8 } else { 1 << rest.len().ilog2() };
                let (piece, after) = rest.split_at(size);
                let value = piece.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
                match size {
                    8 => {
                        self.constant(r::S14, value);
                        self.hot.alu(Alu::Cmp, r::S14, m);
                    }
                    4 => {
                        self.hot.rm(false, None, &[0x81], Alu::Cmp as u8, m);
                        self.hot.i32(value as i32);
                    }
                    2 => {
                        self.hot.rm(false, Some(0x66), &[0x81], Alu::Cmp as u8, m);
                        self.hot.bytes(&(value as u16).to_le_bytes());
                    }
                    _ => {
                        self.hot.rm(false, None, &[0x80], Alu::Cmp as u8, m);
                        self.hot.byte(value as u8);
                    }
                }
                stale.push(self.hot.jcc(cc::NE));
                at += size as i32;
                rest = after;
            }
        }
        self.constant(r::S15, verify.counter);
        self.hot.rm(false, None, &[0xff], 1, M::At(r::S15, 0)); // dec dword
        let settled = smallvec::smallvec![self.hot.jcc(cc::S)];
        self.flags = Flags::Saved;
        for (sites, why) in [(stale, reason::STALE), (settled, reason::SETTLED)] {
            let why = verify.block << 3 | why as u32;
            self.colds.push(Cold::Stale { sites, start, why });
        }
    }

    /// An instruction whose immediate operand is read when it runs.
    pub(super) fn with_immediate(&mut self, item: &Item, immediate: Immediate) {
        use Mnemonic::*;
        self.before(item);
        self.s14 = true;
        let insn = &item.insn;
        let register = home(insn.op_register(0));
        let wide = insn.op_register(0).size() == 8;
        self.constant(r::S14, self.page + u64::from(immediate.offset));
        let m = M::At(r::S14, 0);
        if wide && immediate.size == 4 {
            let to = if insn.mnemonic() == Mov { register } else { r::S14 };
            self.hot.rm(true, None, &[0x63], to, m); // movsxd
        } else {
            let to = if insn.mnemonic() == Mov { register } else { r::S14 };
            self.hot.rm(wide, None, &[0x8b], to, m);
        }
        let number = match insn.mnemonic() {
            Add => 0,
            Or => 1,
            Adc => 2,
            Sbb => 3,
            And => 4,
            Sub => 5,
            Xor => 6,
            Cmp => 7,
            Test => {
                self.hot.rr(wide, &[0x85], r::S14, register);
                self.after(item);
                return;
            }
            _ => return,
        };
        self.hot.rr(wide, &[number << 3 | 3], register, r::S14);
        self.after(item);
    }
}
