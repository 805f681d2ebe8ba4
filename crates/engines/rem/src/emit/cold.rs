//! Code that stands apart from what runs often.

use super::{Cold, Emitter, NewLink};
use crate::asm::{Alu, M, r};
use crate::context::off;
use crate::plan::Mode;
use crate::thunks::reason;

impl Emitter<'_> {
    pub(super) fn aim_hot(&mut self, site: usize) {
        let target = self.cold_at + self.cold.at();
        let from = self.hot_at + site + 4;
        self.hot.code[site..site + 4].copy_from_slice(&((target as i64 - from as i64) as i32).to_le_bytes());
    }

    /// A jump in the cold part to a place in the hot one.
    pub(super) fn cold_to_hot(&mut self, hot: usize) {
        let site = self.cold.jmp();
        let from = self.cold_at + site + 4;
        let target = self.hot_at + hot;
        self.cold.code[site..site + 4].copy_from_slice(&((target as i64 - from as i64) as i32).to_le_bytes());
    }

    pub(super) fn link_stub(&mut self, target: u16, site: u32, mode: Mode) {
        let number = self.first_link + self.links.len() as u32;
        let stub = (self.cold_at + self.cold.at()) as u32;
        self.links.push(NewLink { site, stub, target, mode, check: None });
        self.cold.mov_imm32(r::S14, target.into());
        self.cold.mov_imm32(r::DELTA, number << 3 | reason::LINK as u32);
        self.cold_thunk(self.thunks.exit, false);
    }

    pub(super) fn finish(&mut self) {
        for cold in std::mem::take(&mut self.colds) {
            match cold {
                Cold::Slow { sites, retry, access, description, saved, tag } => {
                    for site in sites {
                        self.aim_hot(site);
                    }
                    self.cold.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, tag));
                    self.slow_call(description, saved);
                    self.slow_return(retry, Some(access));
                }
                Cold::Stack { site, retry, description, saved, low, at } => {
                    self.aim_hot(site);
                    let check = (self.hot_at + site) as u32;
                    self.cold.lea(r::S15, M::At(r::GUEST_SP, low));
                    self.group_slow(description, saved);
                    let beyond = self.slow_return(retry, None);
                    self.plainly(check, at, saved, beyond);
                }
                Cold::Group { site, retry, description, saved, at, tag } => {
                    self.aim_hot(site);
                    let check = (self.hot_at + site) as u32;
                    self.cold.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, tag));
                    self.group_slow(description, saved);
                    let beyond = self.slow_return(retry, None);
                    self.plainly(check, at, saved, beyond);
                }
                Cold::Place(place) => self.place_cold(place),
                Cold::Link { site, target, mode } => {
                    self.aim_hot(site);
                    let mut site = (self.hot_at + site) as u32;
                    if !self.swaps.is_empty() {
                        Self::swap_out(&mut self.cold, &self.swaps);
                        site = (self.cold_at + self.cold.jmp()) as u32;
                    }
                    self.link_stub(target, site, mode);
                }
                Cold::Interpret { sites, offset, saved } => {
                    for site in sites {
                        self.aim_hot(site);
                    }
                    if saved {
                        self.cold.restore_flags(r::S14, off::FLAGS);
                    }
                    Self::swap_out(&mut self.cold, &self.swaps);
                    self.cold.mov_imm32(r::S14, offset.into());
                    self.cold.mov_imm32(r::DELTA, reason::INTERPRET as u32);
                    self.cold_thunk(self.thunks.exit, false);
                }
                Cold::Stale { sites, start, why } => {
                    for site in sites {
                        self.aim_hot(site);
                    }
                    self.cold.restore_flags(r::S14, off::FLAGS);
                    self.cold.mov_imm32(r::S14, start.into());
                    self.cold.mov_imm32(r::DELTA, why);
                    self.cold_thunk(self.thunks.exit, false);
                }
                Cold::InterpretFp { sites, offset, saved, reset } => {
                    for site in sites {
                        self.aim_hot(site);
                    }
                    if reset {
                        self.cold.store_imm32(M::Ctx(off::CONTROL), 0x1f80);
                        self.cold.rm(false, None, &[0x0f, 0xae], 2, M::Ctx(off::CONTROL)); // ldmxcsr
                        self.cold.bytes(&[0xdb, 0xe3]); // fninit
                    }
                    Self::swap_out(&mut self.cold, &self.swaps);
                    if saved {
                        self.cold.restore_flags(r::S14, off::FLAGS);
                    }
                    self.cold.mov_imm32(r::S14, offset.into());
                    self.cold.mov_imm32(r::DELTA, reason::INTERPRET_FP as u32);
                    self.cold_thunk(self.thunks.exit, false);
                }
                Cold::Far { site, target } => {
                    self.aim_hot(site);
                    Self::swap_out(&mut self.cold, &self.swaps);
                    let (mode, jumps) = (self.mode, self.jumps());
                    Self::linear(&mut self.cold, mode, target);
                    self.cold.save_flags(r::S14, off::FLAGS);
                    Self::jump_indirect(&mut self.cold, jumps);
                }
                Cold::Poll { site, target, exchanged, carry } => {
                    self.aim_hot(site);
                    if carry {
                        self.cold.restore_carry(off::FLAGS);
                    }
                    if exchanged {
                        self.cold.mov(r::RCX, r::S14);
                    }
                    Self::swap_out(&mut self.cold, &self.swaps);
                    self.cold.mov_imm32(r::S14, target as u32);
                    self.cold.mov_imm32(r::DELTA, reason::GO_ON as u32);
                    self.cold_thunk(self.thunks.exit, false);
                }
            }
        }
    }
}
