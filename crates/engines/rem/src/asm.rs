//! An assembler for the fixed sequences that surround translated instructions.

/// Host registers by their number in the encoding.
pub(crate) mod r {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RDX: u8 = 2;
    pub(crate) const RBP: u8 = 5;
    /// Holds the guest's RSP.
    pub(crate) const GUEST_SP: u8 = 12;
    /// Distance from guest to host addresses in the current stack page.
    pub(crate) const DELTA: u8 = 13;
    pub(crate) const S14: u8 = 14;
    pub(crate) const S15: u8 = 15;
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum M {
    /// In the engine's context, at an offset from its base in GS.
    Ctx(i32),
    /// As `Ctx`, plus a register.
    CtxAt(u8, i32),
    /// As `Ctx`, plus twice a register.
    CtxAt2(u8, i32),
    /// As `Ctx`, plus eight times a register.
    CtxAt8(u8, i32),
    /// Base and displacement.
    At(u8, i32),
    /// Base, index, scale (as power of two), displacement.
    Index(u8, u8, u8, i32),
    /// No base: index, scale, displacement.
    Scaled(u8, u8, i32),
}

/// Arithmetic of the `op r, r/m` family, by its number.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Xor = 6,
    Cmp = 7,
}

/// Condition codes.
pub(crate) mod cc {
    pub(crate) const E: u8 = 4;
    pub(crate) const NE: u8 = 5;
    pub(crate) const A: u8 = 7;
    pub(crate) const S: u8 = 8;
    pub(crate) const G: u8 = 15;
}

/// Code under construction.
#[derive(Default)]
pub(crate) struct Asm {
    pub(crate) code: Vec<u8>,
}

impl Asm {
    pub(crate) fn at(&self) -> usize {
        self.code.len()
    }

    pub(crate) fn byte(&mut self, b: u8) {
        self.code.push(b);
    }

    pub(crate) fn bytes(&mut self, b: &[u8]) {
        self.code.extend_from_slice(b);
    }

    pub(crate) fn i32(&mut self, v: i32) {
        self.code.extend_from_slice(&v.to_le_bytes());
    }

    /// An instruction with a ModRM byte; `opcode` may start with prefixes that must stand before REX.
    pub(crate) fn rm(&mut self, wide: bool, prefix: Option<u8>, opcode: &[u8], reg: u8, m: M) {
        let (base, index) = match m {
            M::Ctx(_) => (0, 0),
            M::CtxAt(b, _) | M::At(b, _) => (b, 0),
            M::CtxAt2(i, _) | M::CtxAt8(i, _) | M::Scaled(i, ..) => (0, i),
            M::Index(b, i, ..) => (b, i),
        };
        if matches!(m, M::Ctx(_) | M::CtxAt(..) | M::CtxAt2(..) | M::CtxAt8(..)) {
            self.byte(0x65);
        }
        if let Some(p) = prefix {
            self.byte(p);
        }
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.byte(rex);
        }
        self.bytes(opcode);
        let reg = (reg & 7) << 3;
        match m {
            M::Ctx(disp) => {
                self.bytes(&[reg | 4, 0x25]);
                self.i32(disp);
            }
            M::CtxAt2(i, disp) => {
                self.bytes(&[reg | 4, 0x45 | (i & 7) << 3]);
                self.i32(disp);
            }
            M::CtxAt8(i, disp) => {
                self.bytes(&[reg | 4, 0xc5 | (i & 7) << 3]);
                self.i32(disp);
            }
            M::Scaled(i, scale, disp) => {
                self.bytes(&[reg | 4, scale << 6 | (i & 7) << 3 | 5]);
                self.i32(disp);
            }
            M::CtxAt(b, disp) | M::At(b, disp) => {
                let short = i8::try_from(disp).ok();
                let mode = match short {
                    Some(0) if b & 7 != 5 => 0,
                    Some(_) => 0x40,
                    None => 0x80,
                };
                self.byte(mode | reg | b & 7);
                if b & 7 == 4 {
                    self.byte(0x24);
                }
                self.disp(mode, disp);
            }
            M::Index(b, i, scale, disp) => {
                let short = i8::try_from(disp).ok();
                let mode = match short {
                    Some(0) if b & 7 != 5 => 0,
                    Some(_) => 0x40,
                    None => 0x80,
                };
                self.bytes(&[mode | reg | 4, scale << 6 | (i & 7) << 3 | b & 7]);
                self.disp(mode, disp);
            }
        }
    }

    fn disp(&mut self, mode: u8, disp: i32) {
        match mode {
            0 => {}
            0x40 => self.byte(disp as u8),
            _ => self.i32(disp),
        }
    }

    /// An instruction on two registers; `rm` is the r/m operand.
    pub(crate) fn rr(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.byte(rex);
        }
        self.bytes(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    pub(crate) fn mov(&mut self, to: u8, from: u8) {
        self.rr(true, &[0x8b], to, from);
    }

    pub(crate) fn mov32(&mut self, to: u8, from: u8) {
        self.rr(false, &[0x8b], to, from);
    }

    pub(crate) fn load(&mut self, to: u8, m: M) {
        self.rm(true, None, &[0x8b], to, m);
    }

    pub(crate) fn load32(&mut self, to: u8, m: M) {
        self.rm(false, None, &[0x8b], to, m);
    }

    pub(crate) fn store(&mut self, m: M, from: u8) {
        self.rm(true, None, &[0x89], from, m);
    }

    pub(crate) fn store32(&mut self, m: M, from: u8) {
        self.rm(false, None, &[0x89], from, m);
    }

    pub(crate) fn store16(&mut self, m: M, from: u8) {
        self.rm(false, Some(0x66), &[0x89], from, m);
    }

    pub(crate) fn store_imm32(&mut self, m: M, value: i32) {
        self.rm(false, None, &[0xc7], 0, m);
        self.i32(value);
    }

    pub(crate) fn lea(&mut self, to: u8, m: M) {
        self.rm(true, None, &[0x8d], to, m);
    }

    pub(crate) fn lea32(&mut self, to: u8, m: M) {
        self.rm(false, None, &[0x8d], to, m);
    }

    pub(crate) fn alu(&mut self, op: Alu, to: u8, m: M) {
        self.rm(true, None, &[(op as u8) << 3 | 3], to, m);
    }

    pub(crate) fn alu_imm(&mut self, op: Alu, wide: bool, to: u8, value: i32) {
        match i8::try_from(value) {
            Ok(v) => {
                self.rr(wide, &[0x83], op as u8, to);
                self.byte(v as u8);
            }
            Err(_) => {
                self.rr(wide, &[0x81], op as u8, to);
                self.i32(value);
            }
        }
    }

    pub(crate) fn mov_imm32(&mut self, to: u8, value: u32) {
        if to >= 8 {
            self.byte(0x41);
        }
        self.byte(0xb8 | to & 7);
        self.i32(value as i32);
    }

    pub(crate) fn shift_imm(&mut self, kind: u8, wide: bool, to: u8, count: u8) {
        self.rr(wide, &[0xc1], kind, to);
        self.byte(count);
    }

    /// RORX, which leaves flags alone (BMI2).
    pub(crate) fn rorx32(&mut self, to: u8, from: u8, count: u8) {
        let rxb = (!(to >> 3) & 1) << 7 | 0x40 | (!(from >> 3) & 1) << 5 | 3;
        self.bytes(&[0xc4, rxb, 0x7b, 0xf0, 0xc0 | (to & 7) << 3 | from & 7, count]);
    }

    /// A jump to be aimed later; gives the place of its displacement.
    pub(crate) fn jmp(&mut self) -> usize {
        self.byte(0xe9);
        self.i32(0);
        self.at() - 4
    }

    pub(crate) fn jcc(&mut self, cond: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | cond]);
        self.i32(0);
        self.at() - 4
    }

    pub(crate) fn put32(&mut self, at: usize, value: i32) {
        self.code[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Aims a jump whose displacement is at `site` at the end of the code.
    pub(crate) fn aim(&mut self, site: usize) {
        let distance = self.at() as i64 - (site + 4) as i64;
        self.put32(site, distance as i32);
    }

    /// A short conditional jump to be aimed by [`Asm::aim_short`].
    pub(crate) fn jcc_short(&mut self, cond: u8) -> usize {
        self.bytes(&[0x70 | cond, 0]);
        self.at() - 1
    }

    pub(crate) fn aim_short(&mut self, at: usize) {
        let distance = self.at() - at - 1;
        debug_assert!(distance < 128);
        self.code[at] = distance as u8;
    }

    pub(crate) fn call(&mut self) -> usize {
        self.byte(0xe8);
        self.i32(0);
        self.at() - 4
    }

    /// Moves CF alone to the context, to where [`Asm::save_flags`] has it, through `tmp`. What is stored is as wide as what is
    /// read back, so that the processor can forward it.
    pub(crate) fn save_carry(&mut self, tmp: u8, slot: i32) {
        self.rr(false, &[0x1b], tmp, tmp); // sbb
        self.alu_imm(Alu::And, false, tmp, 0x101);
        self.store32(M::Ctx(slot), tmp);
    }

    /// Takes CF back, and leaves the other flags alone.
    pub(crate) fn restore_carry(&mut self, slot: i32) {
        self.rm(false, None, &[0x0f, 0xba], 4, M::Ctx(slot)); // bt dword
        self.byte(8);
    }

    /// Moves the arithmetic flags to the context, through `tmp`.
    pub(crate) fn save_flags(&mut self, tmp: u8, slot: i32) {
        self.mov(tmp, r::RAX);
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.store16(M::Ctx(slot), r::RAX);
        self.mov(r::RAX, tmp);
    }

    /// Takes the arithmetic flags back from the context, through `tmp`.
    pub(crate) fn restore_flags(&mut self, tmp: u8, slot: i32) {
        self.mov(tmp, r::RAX);
        self.rm(false, None, &[0x0f, 0xb7], r::RAX, M::Ctx(slot)); // movzx eax, word
        self.bytes(&[0x04, 127, 0x9e]); // add al, 127 (sets OF as it was); sahf
        self.mov(r::RAX, tmp);
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    use super::*;

    fn text(code: &[u8]) -> String {
        let mut out = Vec::new();
        for insn in Decoder::new(64, code, DecoderOptions::NONE).iter() {
            let mut s = String::new();
            IntelFormatter::new().format(&insn, &mut s);
            out.push(s);
        }
        out.join("; ")
    }

    #[test]
    fn operands_are_encoded_as_meant() {
        let mut a = Asm::default();
        a.load(r::S15, M::Ctx(0x10));
        a.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, 0x1000));
        a.lea(r::S15, M::Index(5, 13, 2, 0));
        a.lea32(r::S15, M::At(12, -8));
        a.load(0, M::At(13, 0));
        a.load32(r::S14, M::CtxAt8(r::S14, 0x100));
        a.lea(r::S14, M::Scaled(r::S14, 1, 0));
        a.rorx32(r::S14, r::S15, 7);
        assert_eq!(
            text(&a.code),
            "mov r15,gs:[10h]; xor r15,gs:[r14+1000h]; lea r15,[rbp+r13*4]; lea r15d,[r12-8]; mov rax,[r13]; \
             mov r14d,gs:[r14*8+100h]; lea r14,[r14*2]; rorx r14d,r15d,7"
        );
    }

    #[test]
    fn flags_are_saved_and_restored_through_the_context() {
        let mut a = Asm::default();
        a.save_flags(r::S14, 0x20);
        a.restore_flags(r::S14, 0x20);
        assert_eq!(
            text(&a.code),
            "mov r14,rax; lahf; seto al; mov gs:[20h],ax; mov rax,r14; mov r14,rax; movzx eax,word ptr gs:[20h]; \
             add al,7Fh; sahf; mov rax,r14"
        );
    }
}
