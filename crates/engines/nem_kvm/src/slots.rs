//! KVM's memory slots, kept in step with `pgm`'s layout.
#![allow(unsafe_code)] // tells KVM where guest memory lies

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
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
}

/// The slots of one VM.
#[derive(Default)]
pub(crate) struct Slots {
    list: Vec<Slot>,
    layout: Option<Layout>,
}

impl Slots {
    /// Brings the slots in line with `pgm`.
    pub(crate) fn update(&mut self, vm: &VmFd, pgm: &Pgm) -> Result<(), kvm_ioctls::Error> {
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
                None => set(vm, &slot, 0)?,
            }
        }
        self.list = kept;
        for mut slot in wanted {
            slot.id = (0..).find(|id| self.list.iter().all(|s| s.id != *id)).unwrap_or(u32::MAX);
            set(vm, &slot, slot.len)?;
            self.list.push(slot);
        }
        self.layout = Some(layout);
        Ok(())
    }
}

fn set(vm: &VmFd, slot: &Slot, len: u64) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.id,
        flags: if slot.read_only && len > 0 { KVM_MEM_READONLY } else { 0 },
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
