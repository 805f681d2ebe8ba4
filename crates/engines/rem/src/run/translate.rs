//! Finding blocks, translating those that are not there, and entering them into the jump cache.

use std::sync::atomic::AtomicU32;

use cpum::CpuState;
use iem::Source;
use iem::tlb::Frame;

use super::{MAX_BLOCK_CODE, MAX_INSN, Rem};
use crate::asm::Asm;
use crate::cache::{Block, Cache, Fleeting, Link, Page, PageJumps, Placed};
use crate::context::Jump;
use crate::emit::verify::Verify;
use crate::emit::{Emitter, Place};
use crate::plan::{Aim, HOT, Kept, Kind, Mode, Plan, Segments, WARM};

impl Rem {
    /// The block at `pc`, translated if need be. `None`: the interpreter must go on for one instruction.
    pub(super) fn find(&mut self, cpu: &CpuState, pc: u64, mode: Mode) -> Option<u32> {
        let bank = self.iem.core().code_bank();
        if let Some(at) = self.iem.core().tlb.fetch(bank, pc)
            && let Some(&index) = self.cache.by_place.get(&(at, mode.number()))
            && self.cache.blocks[index as usize].second.is_none()
        {
            return Some(index);
        }
        if mode.long && !iem::core::canonical(pc) {
            return None;
        }
        let (_, frame) = self.iem.core().place_code(cpu, pc).ok()?;
        let frame = frame?;
        if let Some(&index) = self.cache.by_place.get(&(frame.key() + (pc & 0xfff), mode.number())) {
            let second = self.cache.blocks[index as usize].second;
            if second.is_none() || second == self.next_page(cpu, pc, mode).map(Frame::key) {
                return Some(index);
            }
        }
        self.translate(cpu, frame, pc, mode)
    }

    /// The frame of the page behind the one of `pc`.
    pub(super) fn next_page(&mut self, cpu: &CpuState, pc: u64, mode: Mode) -> Option<Frame> {
        let next = (pc | 0xfff).wrapping_add(1);
        if !iem::core::canonical(next) || !mode.long && next > u32::MAX.into() {
            return None;
        }
        self.iem.core().place_code(cpu, next).ok()?.1
    }

    pub(super) fn translate(&mut self, cpu: &CpuState, frame: Frame, pc: u64, mode: Mode) -> Option<u32> {
        if !self.code.fits(MAX_BLOCK_CODE, MAX_BLOCK_CODE) {
            self.drop_all();
        }
        self.drop_if_stale(frame.key());
        let mut bytes = std::mem::take(&mut self.bytes);
        let result = self.translate_from(cpu, frame, pc, mode, &mut bytes);
        self.bytes = bytes;
        result
    }

    /// The same with room for the bytes of a page and an instruction.
    pub(super) fn translate_from(
        &mut self,
        cpu: &CpuState,
        frame: Frame,
        pc: u64,
        mode: Mode,
        bytes: &mut [u8],
    ) -> Option<u32> {
        // What lies farther away is neither in the block nor looked at.
        const BEFORE: u16 = 256;
        const BEHIND: u16 = 1280;
        let start = (pc & 0xfff) as u16;
        let key = frame.key();
        // 16-bit code ends where its segment does.
        let room = match mode.segments {
            Some(Segments { big: false, ip, .. }) => (0x1_0000 - ip).clamp(0, 4096 + MAX_INSN as i32) as u16,
            _ => 4096 + MAX_INSN as u16,
        };
        let (known, end) = (start.saturating_sub(BEFORE), (start + BEHIND).min(4096).min(room));
        let window = usize::from(known)..usize::from(end);
        self.iem.core().frames.read_bytes(frame, known.into(), &mut bytes[window]);
        let fleeting = match self.cache.pages.get(&key) {
            Some(page) => page.fleeting.is_some(),
            None => self.cache.rewritten.get(&key).is_some_and(|known| !known.stable),
        };
        if fleeting {
            return self.translate_fleeting(frame, &bytes[..end.into()], start, mode);
        }
        let aim = Aim { mode, machine: self.machine, fleeting };
        let moving = &self.cache.moving;
        let moving = |at: u16| moving.contains(&(key + u64::from(at)));
        let heat = self.cache.heat.get(&key).copied().unwrap_or(0);
        let kept = Kept { sites: &mut self.cache.sites, moving: &moving, heat };
        let mut plan = Plan::new(&bytes[..end.into()], known, start, aim, &mut self.info, kept);
        let mut second = None;
        if plan.items.is_empty() {
            if end < 4096 {
                return None;
            }
            let next = self.next_page(cpu, pc, mode)?;
            self.drop_if_stale(next.key());
            if self.cache.pages.get(&next.key()).is_some_and(|page| page.fleeting.is_some()) {
                return None;
            }
            self.iem.core().frames.read_bytes(next, 0, &mut bytes[4096..]);
            plan = Plan::one(bytes, start, aim, &mut self.info)?;
            if plan.end > room {
                return None;
            }
            let tail = iem::mark(self.iem.core(), next, 0, u64::from(plan.end) - 4096)?;
            let mut again = [0; MAX_INSN];
            self.iem.core().frames.read_bytes(next, 0, &mut again);
            if again != bytes[4096..] {
                return None;
            }
            second = Some((next.key(), tail));
        }
        let mut source = None;
        for &(from, to) in &plan.ranges {
            let marked = iem::mark(self.iem.core(), frame, from.into(), (to - from).into())?;
            source.get_or_insert(marked);
        }
        let mut again = [0; 256];
        for &(from, to) in &plan.ranges {
            for (n, known) in bytes[from.into()..to.into()].chunks(again.len()).enumerate() {
                let (at, now) = (usize::from(from) + n * again.len(), &mut again[..known.len()]);
                self.iem.core().frames.read_bytes(frame, at as u64, now);
                if now != known {
                    return None;
                }
            }
        }
        let source = source?;
        let second_key = second.as_ref().map(|s| s.0);
        let index = self.emit(&plan, bytes, key, start, mode, second_key);
        for (key, source) in [(key, source)].into_iter().chain(second) {
            self.cache
                .pages
                .entry(key)
                .or_insert_with(|| Page { source, blocks: Vec::new(), fleeting: None })
                .blocks
                .push(index);
        }
        Some(index)
    }

    /// A request found generated code at work in the page of `pc`: after some of these all its code is worth more effort.
    pub(super) fn sample(&mut self, pc: u64) {
        let core = self.iem.core();
        let bank = core.code_bank();
        let Some(at) = core.tlb.fetch(bank, pc) else { return };
        let key = at & !0xfff;
        let Some(page) = self.cache.pages.get_mut(&key).filter(|page| page.fleeting.is_none()) else {
            return;
        };
        let heat = self.cache.heat.entry(key).or_default();
        *heat = heat.saturating_add(1);
        self.stats.pages_warm += u64::from(*heat == WARM);
        self.stats.pages_hot += u64::from(*heat == HOT);
        if matches!(*heat, WARM | HOT) {
            for index in std::mem::take(&mut page.blocks) {
                self.drop_block(index);
            }
        }
    }

    /// Translates from a page whose code is overwritten time and again.
    pub(super) fn translate_fleeting(
        &mut self,
        frame: Frame,
        bytes: &[u8],
        start: u16,
        mode: Mode,
    ) -> Option<u32> {
        let aim = Aim { mode, machine: self.machine, fleeting: true };
        let kept = Kept { sites: &mut self.cache.sites, moving: &|_| false, heat: 0 };
        let mut plan = Plan::new(bytes, 0, start, aim, &mut self.info, kept);
        if plan.items.is_empty() || plan.end > 4096 {
            return None;
        }
        let key = frame.key();
        let known = self.cache.rewritten.get(&key).copied().unwrap_or_default();
        let (memory, number) = self.iem.core().frames.memory(frame);
        let memory = memory.clone();
        let generation = memory.code_page(number)?.generation();
        let page = self.cache.pages.entry(key).or_insert_with(|| Page {
            source: Source { memory, page: number, generation },
            blocks: Vec::new(),
            fleeting: Some(Fleeting {
                left: Box::new(AtomicU32::new(known.patience())),
                extent: (start, plan.end),
                seen: 0,
            }),
        });
        let fleeting = page.fleeting.as_mut()?;
        fleeting.extent = (fleeting.extent.0.min(start), fleeting.extent.1.max(plan.end));
        let counter = std::ptr::from_ref(&*fleeting.left).expose_provenance() as u64;
        let block = self.cache.blocks.len() as u32;
        page.blocks.push(block);
        plan.verify = Some(Verify { fixed: plan.fixed(bytes), counter, block });
        self.stats.fleeting += 1;
        Some(self.emit(&plan, bytes, key, start, mode, None))
    }

    pub(super) fn emitter<'a>(&'a mut self, place: &Place<'a>, mode: Mode) -> Emitter<'a> {
        let room = std::mem::take(&mut self.room);
        Emitter::new(place, &self.thunks, &self.host, mode, room, &mut self.encoder, &mut self.info)
    }

    /// Places code where an emitter was told that it would stand.
    pub(super) fn place(&mut self, mut hot: Asm, mut cold: Asm) {
        self.code.append(&hot.code, &cold.code);
        hot.code.clear();
        cold.code.clear();
        self.room = (hot, cold);
    }

    /// Makes code of a plan for offset `start` of the page at host address `key`, and enters the block.
    pub(super) fn emit(
        &mut self,
        plan: &Plan,
        bytes: &[u8],
        key: u64,
        start: u16,
        mode: Mode,
        second: Option<u64>,
    ) -> u32 {
        let (hot, cold) = self.code.next();
        let first_link = self.cache.links.len() as u32;
        let first_place = self.cache.places.len() as u32;
        let place =
            Place { base: self.code.base(), page: key, code: bytes, hot, cold, first_link, first_place };
        let checked = self.unknown && !mode.plain;
        let output = self.emitter(&place, mode).block(plan, start, checked);
        self.place(output.hot, output.cold);
        self.stats.translated += 1;
        self.stats.translated_instructions += plan.items.len() as u64;
        self.stats.translated_bytes += u64::from(plan.end - start);
        let index = self.cache.blocks.len() as u32;
        let number = mode.number();
        for link in output.links {
            self.cache.links.push(Link {
                site: link.site,
                stub: link.stub,
                page: key,
                target: link.target,
                mode: link.mode,
                check: link.check,
                failures: 0,
            });
        }
        let block = self.cache.blocks.len() as u32;
        self.cache.places.extend(output.places.into_iter().map(|at| (at, block)));
        let interpret = match plan.items.first() {
            Some(item) => match item.kind {
                Kind::Interpret(fp) => Some(fp),
                _ => None,
            },
            None => Some(true),
        };
        self.cache.blocks.push(Block {
            page: key,
            start,
            mode: number,
            second,
            entry: (hot + output.entry) as u32,
            checked: output.checked,
            live: plan.flags_matter(),
            interpret,
            incoming: Vec::new(),
        });
        self.cache.by_place.insert((key + u64::from(start), number), index);
        index
    }

    pub(super) fn drop_if_stale(&mut self, key: u64) {
        if self.cache.pages.get(&key).is_some_and(Page::stale) {
            self.drop_page(key);
        }
    }

    /// Enters a block into the jump cache.
    pub(super) fn remember(&mut self, pc: u64, mode: Mode, index: u32) {
        let block = &self.cache.blocks[index as usize];
        let (start, live, entry) = (block.start, block.live, block.entry as usize);
        let checked = block.checked;
        let checked = if let Some(entry) = checked {
            entry
        } else {
            let (hot, cold) = self.code.next();
            if !self.code.fits(256, 256) {
                return;
            }
            let first_link = self.cache.links.len() as u32;
            let first_place = self.cache.places.len() as u32;
            let page = block.page;
            let place = Place { base: self.code.base(), page, code: &[], hot, cold, first_link, first_place };
            let output = self.emitter(&place, mode).entry_for(start, live, entry);
            self.place(output.hot, output.cold);
            let Some(entry) = output.checked else { return };
            self.cache.blocks[index as usize].checked = Some(entry);
            entry
        };
        let block = &self.cache.blocks[index as usize];
        self.cache.recent.put(block);
        let second = block.second.map(|_| (pc | 0xfff).wrapping_add(1));
        self.enter_jump(pc, mode, checked, second);
    }

    /// Enters code at `pc` that reaches into the page `second` into the jump cache.
    pub(super) fn enter_jump(&mut self, pc: u64, mode: Mode, checked: u32, second: Option<u64>) {
        let slot = (pc & 0xffff) as u16;
        let code = self.code.base() + u64::from(checked);
        self.set_jump(
            mode.bank.into(),
            slot.into(),
            Jump { tag: (pc | self.code_number).wrapping_neg(), code },
        );
        let code_bank = self.iem.core().code_bank();
        let tlb = &self.iem.core().tlb;
        let global = tlb.is_global(code_bank, pc) && second.is_none_or(|next| tlb.is_global(code_bank, next));
        let place = Placed::new(mode.bank, tlb.space());
        for page in [pc & !0xfff].into_iter().chain(second) {
            let Cache { jumps, local, users, .. } = &mut self.cache;
            let entry = jumps.entry((place, page)).or_insert_with(|| {
                if mode.user() {
                    note_page(&mut users[place.space()], page);
                }
                PageJumps { global: true, slots: Vec::new() }
            });
            if entry.global && !global && !mode.user() {
                entry.global = false;
                note_page(local, (place, page));
            }
            entry.slots.push(slot);
            // Two pages that take turns in a slot must not make the list grow.
            if entry.slots.len() >= 2 * 4096 {
                entry.slots.sort_unstable();
                entry.slots.dedup();
            }
        }
    }
}

/// Adds to a list that names pages again whose entries were dropped one by one.
fn note_page<T: Ord>(list: &mut Vec<T>, page: T) {
    const MANY: usize = 4096;
    if list.len() >= MANY && list.len().is_power_of_two() {
        list.sort_unstable();
        list.dedup();
    }
    list.push(page);
}
