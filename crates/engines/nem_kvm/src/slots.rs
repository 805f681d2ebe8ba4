//! KVM's memory slots, kept in step with `pgm`'s layout, and what KVM knows of pages that guests have written.
#![allow(unsafe_code)] // tells KVM where guest memory lies

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, VmFd};
use pgm::{HostMemory, Layout, PAGE_SIZE, Pgm, Target};

/// Slots do not grow across it: what lies below is moved about by the chipset, and main memory shall not move with it.
const FIRST_MIB: u64 = 1 << 20;

/// Memory that KVM maps.
#[derive(Clone)]
struct Slot {
    id: u32,
    start: u64,
    len: u64,
    memory: Arc<HostMemory>,
    offset: u64,
    read_only: bool,
    /// KVM notes the pages that guests write.
    logged: bool,
}

impl Slot {
    fn is_same(&self, other: &Self) -> bool {
        self.start == other.start
            && self.len == other.len
            && Arc::ptr_eq(&self.memory, &other.memory)
            && self.offset == other.offset
            && self.read_only == other.read_only
    }

    /// Whether `next` goes on where this ends, in the same memory.
    fn continues_in(&self, next: &Self) -> bool {
        self.start + self.len == next.start
            && next.start != FIRST_MIB
            && Arc::ptr_eq(&self.memory, &next.memory)
            && self.offset + self.len == next.offset
            && self.read_only == next.read_only
    }

    fn holds(&self, memory: &HostMemory) -> bool {
        self.memory.base() == memory.base()
    }

    /// Marks what the guest may have written through this slot.
    fn mark_all(&self) {
        for at in (0..self.len).step_by(PAGE_SIZE as usize) {
            self.memory.mark_dirty((self.offset + at) / PAGE_SIZE);
        }
    }

    /// Marks what KVM has noted since it was asked last.
    fn mark_noted(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        let first = self.offset / PAGE_SIZE;
        for (word, at) in vm.get_dirty_log(self.id, self.len as usize)?.into_iter().zip((0..).step_by(64)) {
            let mut rest: u64 = word;
            while rest != 0 {
                self.memory.mark_dirty(first + at + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
        Ok(())
    }
}

/// The slots of one VM.
#[derive(Default)]
pub(crate) struct Slots {
    list: Vec<Slot>,
    layout: Option<Layout>,
    /// Where memory begins whose written pages somebody wants to know.
    watched: Vec<usize>,
    /// Ranges whose writes KVM holds back, if it can.
    posted: Vec<(u64, u32)>,
}

impl Slots {
    /// Brings the slots in line with `pgm`; `posts` tells whether KVM can hold writes back.
    pub(crate) fn update(&mut self, vm: &VmFd, pgm: &Pgm, posts: bool) -> Result<(), kvm_ioctls::Error> {
        let layout = pgm.layout();
        if self.layout.as_ref().is_some_and(|known| known.is_same(&layout)) {
            return Ok(());
        }
        let mut wanted = wanted(&layout);
        let mut kept = Vec::new();
        // First what goes, since slots may not overlap.
        for slot in std::mem::take(&mut self.list) {
            match wanted.iter().position(|w| w.is_same(&slot)) {
                Some(at) => {
                    wanted.remove(at);
                    kept.push(slot);
                }
                None => {
                    set(vm, &slot, 0)?;
                    // Nobody can ask KVM any more.
                    if slot.logged {
                        slot.mark_all();
                    }
                }
            }
        }
        self.list = kept;
        for mut slot in wanted {
            slot.id = (0..).find(|id| self.list.iter().all(|s| s.id != *id)).unwrap_or(u32::MAX);
            slot.logged = !slot.read_only && self.watched.contains(&slot.memory.base().addr());
            set(vm, &slot, slot.len)?;
            self.list.push(slot);
        }
        if posts {
            self.update_posted(vm, &layout)?;
        }
        self.layout = Some(layout);
        Ok(())
    }

    fn update_posted(&mut self, vm: &VmFd, layout: &Layout) -> Result<(), kvm_ioctls::Error> {
        let wanted = posted(layout);
        for &(start, len) in self.posted.iter().filter(|zone| !wanted.contains(zone)) {
            vm.unregister_coalesced_mmio(IoEventAddress::Mmio(start), len)?;
        }
        for &(start, len) in wanted.iter().filter(|zone| !self.posted.contains(zone)) {
            vm.register_coalesced_mmio(IoEventAddress::Mmio(start), len)?;
        }
        self.posted = wanted;
        Ok(())
    }

    /// Marks all pages whose writes KVM was to note.
    pub(crate) fn mark_logged(&self) {
        self.list.iter().filter(|s| s.logged).for_each(Slot::mark_all);
    }

    /// See [`pgm::Backlog::collect_dirty`].
    pub(crate) fn collect_dirty(&mut self, vm: &VmFd, memory: &HostMemory) -> Result<(), kvm_ioctls::Error> {
        let base = memory.base().addr();
        if self.watched.contains(&base) {
            return self
                .list
                .iter()
                .filter(|s| s.logged && s.holds(memory))
                .try_for_each(|s| s.mark_noted(vm));
        }
        self.watched.push(base);
        for slot in self.list.iter_mut().filter(|s| !s.read_only && s.holds(memory)) {
            slot.logged = true;
            set(vm, slot, slot.len)?;
            slot.mark_all();
        }
        Ok(())
    }

    /// See [`pgm::Backlog::forget_dirty`].
    pub(crate) fn forget_dirty(&mut self, vm: &VmFd, memory: &HostMemory) -> Result<(), kvm_ioctls::Error> {
        self.watched.retain(|&base| base != memory.base().addr());
        for slot in self.list.iter_mut().filter(|s| s.logged && s.holds(memory)) {
            slot.logged = false;
            set(vm, slot, slot.len)?;
        }
        Ok(())
    }
}

/// The ranges whose writes may be held back.
fn posted(layout: &Layout) -> Vec<(u64, u32)> {
    let ranges = layout.ranges().filter(|(_, _, backing)| backing.posted);
    ranges.filter_map(|(start, len, _)| Some((start.0, u32::try_from(len).ok()?))).collect()
}

fn set(vm: &VmFd, slot: &Slot, len: u64) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.id,
        flags: match slot {
            _ if len == 0 => 0,
            Slot { read_only: true, .. } => KVM_MEM_READONLY,
            Slot { logged: true, .. } => KVM_MEM_LOG_DIRTY_PAGES,
            _ => 0,
        },
        guest_phys_addr: slot.start,
        memory_size: len,
        userspace_addr: slot.memory.base() as u64 + slot.offset,
    };
    // SAFETY: the range lies within the memory (`wanted`), which `Slots` keeps until the slot is removed; `Machine` in `vcpu` drops the
    // VM's descriptors before the slots.
    unsafe { crate::sys::set_slot(vm, region) }
}

/// The slots that a layout asks for, without numbers.
fn wanted(layout: &Layout) -> Vec<Slot> {
    let mut list: Vec<Slot> = Vec::new();
    for (start, len, backing) in layout.ranges() {
        let Target::Memory { memory, offset } = &backing.read else { continue };
        let writable = matches!(&backing.write, Target::Memory { memory: to, offset: at }
            if Arc::ptr_eq(to, memory) && at == offset);
        // Only whole pages, with the same place in the page on both sides.
        if start.0 % PAGE_SIZE != offset % PAGE_SIZE {
            continue;
        }
        let first = start.0.next_multiple_of(PAGE_SIZE);
        let end = (start.0 + len.min(memory.len().saturating_sub(*offset))) / PAGE_SIZE * PAGE_SIZE;
        if first >= end {
            continue;
        }
        let slot = Slot {
            id: 0,
            start: first,
            len: end - first,
            memory: memory.clone(),
            offset: offset + (first - start.0),
            read_only: !writable,
            logged: false,
        };
        match list.last_mut() {
            Some(last) if last.continues_in(&slot) => last.len += slot.len,
            _ => list.push(slot),
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use pgm::{Backing, Layer, MmioHandler};
    use vbox_types::{ByteSize, GuestPhys, VcpuId};

    use super::*;

    struct Registers;
    impl MmioHandler for Registers {
        fn mmio_read(&self, _: VcpuId, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: VcpuId, _: u64, _: &[u8]) {}
    }

    fn places(pgm: &Pgm) -> Vec<(u64, u64, bool)> {
        wanted(&pgm.layout()).iter().map(|s| (s.start, s.len, s.read_only)).collect()
    }

    #[test]
    fn memory_is_mapped_around_registers_and_rom_is_read_only() {
        let pgm = Pgm::new(vec![]);
        let ram = Arc::new(HostMemory::new("ram", ByteSize(0x20_0000)).unwrap());
        let rom = Arc::new(HostMemory::new("rom", ByteSize(0x1000)).unwrap());
        pgm.map(GuestPhys(0), 0x20_0000, Layer::Ram, Backing::ram(ram, 0));
        pgm.map(GuestPhys(0xa_0000), 0x2_0000, Layer::Chipset, Backing::mmio(Arc::new(Registers)));
        pgm.map(GuestPhys(0xf_f000), 0x1000, Layer::Rom, Backing::rom(rom, 0));
        assert_eq!(
            places(&pgm),
            [
                (0, 0xa_0000, false),
                (0xc_0000, 0x3_f000, false),
                (0xf_f000, 0x1000, true),
                (0x10_0000, 0x10_0000, false)
            ]
        );
    }

    #[test]
    fn writes_are_held_back_where_a_posted_range_shows_and_memory_does_not_lie_over_it() {
        let pgm = Pgm::new(vec![]);
        let ram = Arc::new(HostMemory::new("ram", ByteSize(0x1_0000)).unwrap());
        pgm.map(GuestPhys(0xa_0000), 0x2_0000, Layer::Chipset, Backing::posted(Arc::new(Registers)));
        pgm.map(GuestPhys(0xc_0000), 0x1000, Layer::Chipset, Backing::mmio(Arc::new(Registers)));
        assert_eq!(posted(&pgm.layout()), [(0xa_0000, 0x2_0000)]);
        let direct = pgm.map(GuestPhys(0xa_0000), 0x1_0000, Layer::Chipset, Backing::ram(ram, 0));
        assert_eq!(posted(&pgm.layout()), [(0xb_0000, 0x1_0000)]);
        pgm.unmap(direct);
        assert_eq!(posted(&pgm.layout()), [(0xa_0000, 0x2_0000)]);
    }

    #[test]
    fn pages_that_registers_share_are_left_to_exits() {
        let pgm = Pgm::new(vec![]);
        let ram = Arc::new(HostMemory::new("ram", ByteSize(0x4000)).unwrap());
        pgm.map(GuestPhys(0), 0x4000, Layer::Ram, Backing::ram(ram, 0));
        pgm.map(GuestPhys(0x1400), 0x100, Layer::Fixed, Backing::mmio(Arc::new(Registers)));
        assert_eq!(places(&pgm), [(0, 0x1000, false), (0x2000, 0x2000, false)]);
    }

    #[test]
    fn memory_that_is_shown_in_two_halves_is_one_slot_only_above_the_first_mib() {
        let pgm = Pgm::new(vec![]);
        let ram = Arc::new(HostMemory::new("ram", ByteSize(0x30_0000)).unwrap());
        pgm.map(GuestPhys(0), 0x10_0000, Layer::Ram, Backing::ram(ram.clone(), 0));
        pgm.map(GuestPhys(0x10_0000), 0x10_0000, Layer::Ram, Backing::ram(ram.clone(), 0x10_0000));
        pgm.map(GuestPhys(0x20_0000), 0x10_0000, Layer::Ram, Backing::ram(ram, 0x20_0000));
        assert_eq!(places(&pgm), [(0, 0x10_0000, false), (0x10_0000, 0x20_0000, false)]);
    }
}
