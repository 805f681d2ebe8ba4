//! The software TLB and the frames of host memory it points into.
//!
//! An entry holds one tag for each kind of access and the distance from guest linear to host address:
//!
//! ```text
//! entry = bank[(linear >> 12) & 4095]
//! linear ^ entry.read  <=  4096 - size     hit: page, permission and no page crossing in one compare
//! host address = linear + entry.delta
//! ```
//!
//! A tag that must not match holds the page number of a neighbouring index, which is never looked up here. Pages that need more
//! than a copy (device registers, pages with decoded code for writes, ROM for writes) get no tag and are served by the slow path.
//!
//! There is one bank of entries for each class of privilege ([`Bank`]); one of them is never filled, for times at which each
//! access must be looked at.
//!
//! The user's bank, and a part of the memory in front of the entries, exist once for each of [`SPACES`] address spaces, told
//! apart by their PCID (Intel SDM volume 3, 4.10.1). Each space has a view of the whole memory in which its own parts are mapped at the place of
//! the first one's, so that going to another space is going to another base address.
#![allow(unsafe_code)] // guest memory is reached by host pointers; only this module dereferences them

use std::alloc::Layout;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use pgm::HostMemory;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::flags::Int;

/// Entries in a bank.
pub const ENTRIES: usize = 4096;
/// Address spaces whose user translations are kept at a time.
pub const SPACES: usize = 8;
const PAGE: u64 = 0xfff;

/// The privilege that translations are kept for, as offset of the bank's first entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Bank {
    /// Supervisor, with SMAP in force if it is on.
    Supervisor = 0,
    User = ENTRIES,
    /// Supervisor with SMAP overridden by RFLAGS.AC.
    Override = 2 * ENTRIES,
    /// Never holds anything: each access takes the slow path.
    Slow = 3 * ENTRIES,
}

/// One translation. Generated code reads entries too.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    pub read: u64,
    pub write: u64,
    pub exec: u64,
    /// What to add to a linear address in the page for the host address, modulo 2^64.
    pub delta: u64,
}

/// Bytes in front of the entries that belong to an engine which generates code: it reaches both from one base register.
pub const ENGINE_BYTES: usize = 4096 + (7 << 20);
/// Those of them that each address space has for itself.
pub const ENGINE_OWN: Range<usize> = 4096 + (1 << 20)..4096 + (2 << 20);

/// What generated code works on.
#[repr(C, align(4096))]
struct Area {
    engine: [u8; ENGINE_BYTES],
    entries: [Entry; 4 * ENTRIES],
}

/// Where the user's bank lies in the area.
const USER_BANK: Range<usize> = {
    let start = std::mem::offset_of!(Area, entries) + Bank::User as usize * size_of::<Entry>();
    start..start + ENTRIES * size_of::<Entry>()
};
/// Bytes that an address space has for itself.
const OWN_BYTES: usize = (ENGINE_OWN.end - ENGINE_OWN.start) + (USER_BANK.end - USER_BANK.start);

const _: () = assert!(
    ENGINE_OWN.start.is_multiple_of(4096)
        && ENGINE_OWN.end.is_multiple_of(4096)
        && USER_BANK.start.is_multiple_of(4096)
        && USER_BANK.end.is_multiple_of(4096)
);

/// An area's place.
#[derive(Clone, Copy)]
struct AreaRef(NonNull<Area>);

// SAFETY: only the object that holds the views of an area reaches it.
unsafe impl Send for AreaRef {}

impl AreaRef {
    #[inline(always)]
    fn entries(&self) -> &[Entry; 4 * ENTRIES] {
        // SAFETY: the mapping lives as long as the `Tlb` that holds this; generated code runs only while its engine borrows
        // that mutably.
        unsafe { &(*self.0.as_ptr()).entries }
    }

    #[inline(always)]
    fn entries_mut(&mut self) -> &mut [Entry; 4 * ENTRIES] {
        // SAFETY: as above; of views of the same memory only one is used at a time, because all are reached through one `Tlb`.
        unsafe { &mut (*self.0.as_ptr()).entries }
    }
}

/// The area as one address space sees it. Its place never changes.
struct View(AreaRef);

impl View {
    /// Maps the view of space `n`.
    fn new(memory: &OwnedFd, n: usize) -> Result<Self, Errno> {
        let all = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a mapping at an address of the kernel's choice; zeros are valid for the area's integers. What no engine
        // touches costs no memory.
        let at = unsafe {
            mmap(std::ptr::null_mut(), size_of::<Area>(), all, MapFlags::SHARED, memory, 0)?.cast::<u8>()
        };
        let view = Self(AreaRef(NonNull::new(at.cast()).ok_or(Errno::NOMEM)?));
        if n > 0 {
            let mut from = size_of::<Area>() + (n - 1) * OWN_BYTES;
            for part in [ENGINE_OWN, USER_BANK] {
                let len = part.end - part.start;
                // SAFETY: replaces a part of the mapping just made, which nobody has seen yet.
                unsafe {
                    let at = at.add(part.start).cast();
                    mmap(at, len, all, MapFlags::SHARED | MapFlags::FIXED, memory, from as u64)?;
                }
                from += len;
            }
        }
        Ok(view)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped.
        let _ = unsafe { munmap(self.0.0.as_ptr().cast(), size_of::<Area>()) };
    }
}

/// A tag that matches no address looked up at `index`.
const fn no_tag(index: usize) -> u64 {
    ((index as u64 & (ENTRIES as u64 - 1)) ^ 1) << 12
}

/// A whole page of host memory behind a guest page. It is valid while the [`Frames`] that gave it keeps the memory.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Host address of the page's first byte.
    host: u64,
    /// Index into [`Frames::memories`].
    memory: u32,
    /// Page number within the memory.
    page: u32,
    /// Writes reach the same bytes.
    pub writable: bool,
}

impl Frame {
    /// A number that names the host page, the same for all its guest addresses.
    pub fn key(self) -> u64 {
        self.host
    }
}

/// The memories that frames lie in, kept alive, and a cache of physical pages.
pub struct Frames {
    memories: Vec<Arc<HostMemory>>,
    cache: Box<[(u64, Option<Frame>)]>,
}

const FRAME_CACHE: usize = 2048;
const NO_PAGE: u64 = u64::MAX;

impl Default for Frames {
    fn default() -> Self {
        Self { memories: Vec::new(), cache: vec![(NO_PAGE, None); FRAME_CACHE].into() }
    }
}

impl Frames {
    /// Forgets all frames and the translations made from them; no copy of a frame may be used any more.
    pub fn clear(&mut self, tlb: &mut Tlb) {
        tlb.flush(false);
        self.cache.fill((NO_PAGE, None));
        self.memories.clear();
    }

    /// The frame at physical page address `physical`, if it is memory all over; `resolve` is asked when it is not known.
    #[inline]
    pub fn frame(&mut self, physical: u64, resolve: impl FnOnce(u64) -> pgm::PageView) -> Option<Frame> {
        let page = physical & !PAGE;
        let slot = (page >> 12) as usize % FRAME_CACHE;
        if self.cache[slot].0 == page {
            return self.cache[slot].1;
        }
        let frame = self.make(&resolve(page));
        self.cache[slot] = (page, frame);
        frame
    }

    fn make(&mut self, view: &pgm::PageView) -> Option<Frame> {
        let pgm::Target::Memory { memory, offset } = &view.read else { return None };
        let whole = view.len > PAGE
            && offset & PAGE == 0
            && offset.checked_add(PAGE + 1).is_some_and(|end| end <= memory.len());
        if !whole {
            return None;
        }
        let writable = matches!(&view.write, pgm::Target::Memory { memory: m, offset: o }
            if Arc::ptr_eq(m, memory) && o == offset);
        let index = self.memories.iter().position(|m| Arc::ptr_eq(m, memory)).unwrap_or_else(|| {
            self.memories.push(memory.clone());
            self.memories.len() - 1
        });
        Some(Frame {
            host: memory.base().expose_provenance() as u64 + offset,
            memory: index as u32,
            page: (offset >> 12) as u32,
            writable,
        })
    }

    /// The memory a frame lies in and its page number there.
    pub fn memory(&self, frame: Frame) -> (&Arc<HostMemory>, u64) {
        (&self.memories[frame.memory as usize], frame.page.into())
    }

    /// The host address of an offset in a page, valid as long as translations to it are.
    pub fn host_address(&self, frame: Frame, offset: u64) -> u64 {
        frame.host + (offset & PAGE)
    }

    /// Whether code was decoded from the frame, so that writes must be noted.
    pub fn has_code(&self, frame: Frame) -> bool {
        let (memory, page) = self.memory(frame);
        memory.code_page(page).is_some_and(|c| c.has_code())
    }

    /// Notes a write of `len` bytes at `offset` in the page, made through a pointer; true if it hit decoded code.
    pub fn note_write(&self, frame: Frame, offset: u64, len: u64) -> bool {
        let (memory, page) = self.memory(frame);
        // The bytes must be visible before the code map is looked at: decoding marks first and reads then.
        fence(Ordering::SeqCst);
        let generation = || memory.code_page(page).map(|c| c.generation());
        let before = generation();
        memory.note_write((page << 12) + offset, len);
        before != generation()
    }

    pub fn read<T: Cell>(&self, frame: Frame, offset: u64) -> T {
        assert!(offset + T::BYTES as u64 <= PAGE + 1);
        // SAFETY: inside the frame's page, whose memory `self` keeps.
        unsafe { load(frame.host + offset) }
    }

    pub fn write<T: Cell>(&self, frame: Frame, offset: u64, value: T) {
        assert!(frame.writable && offset + T::BYTES as u64 <= PAGE + 1);
        // SAFETY: inside the frame's page, whose memory `self` keeps, and which may be written.
        unsafe { store(frame.host + offset, value) }
    }

    /// Copies bytes out of a page.
    pub fn read_bytes(&self, frame: Frame, offset: u64, out: &mut [u8]) {
        assert!(offset + out.len() as u64 <= PAGE + 1);
        // SAFETY: as in `read`; `out` is host memory that guests do not share.
        unsafe { std::ptr::copy_nonoverlapping(pointer(frame.host + offset), out.as_mut_ptr(), out.len()) }
    }

    /// Copies bytes into a page. The caller notes the write.
    pub fn write_bytes(&self, frame: Frame, offset: u64, data: &[u8]) {
        assert!(frame.writable && offset + data.len() as u64 <= PAGE + 1);
        // SAFETY: as in `write`; `data` is host memory that guests do not share.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), pointer(frame.host + offset), data.len()) }
    }

    /// Copies `len` bytes between pages, element after element upwards as REP MOVS does where they overlap.
    pub fn copy(&self, to: Frame, to_offset: u64, from: Frame, from_offset: u64, len: u64, element: u64) {
        assert!(to.writable && to_offset + len <= PAGE + 1 && from_offset + len <= PAGE + 1);
        let (dst, src) = (to.host + to_offset, from.host + from_offset);
        if dst.wrapping_sub(src) >= len {
            // SAFETY: both ranges lie in pages that `self` keeps. The destination does not start inside the source, so a
            // copy with memmove semantics equals the ascending one.
            unsafe { std::ptr::copy(pointer(src), pointer(dst), len as usize) }
        } else {
            let mut at = 0;
            while at < len {
                // SAFETY: `at` stays below `len`, a multiple of the element size, so both elements lie inside the ranges.
                unsafe { move_element(dst + at, src + at, element) }
                at += element;
            }
        }
    }

    /// Copies the same way downwards (REP MOVS with the direction flag set): the last elements first.
    pub fn copy_down(
        &self,
        to: Frame,
        to_offset: u64,
        from: Frame,
        from_offset: u64,
        len: u64,
        element: u64,
    ) {
        assert!(
            to.writable
                && to_offset + len <= PAGE + 1
                && from_offset + len <= PAGE + 1
                && len.is_multiple_of(element)
        );
        let (dst, src) = (to.host + to_offset, from.host + from_offset);
        if src.wrapping_sub(dst) >= len {
            // SAFETY: both ranges lie in pages that `self` keeps. The source does not start inside the destination, so a copy with
            // memmove semantics equals the descending one.
            unsafe { std::ptr::copy(pointer(src), pointer(dst), len as usize) }
        } else {
            for n in (0..len / element).rev() {
                // SAFETY: element `n` lies inside both ranges.
                unsafe { move_element(dst + n * element, src + n * element, element) }
            }
        }
    }

    /// Fills `count` elements with a value (REP STOS).
    pub fn fill<T: Cell>(&self, frame: Frame, offset: u64, value: T, count: u64) {
        assert!(frame.writable && offset + count * T::BYTES as u64 <= PAGE + 1);
        let at = frame.host + offset;
        if T::BYTES == 1 || value.bytes_equal() {
            // SAFETY: inside the frame's page.
            unsafe { std::ptr::write_bytes(pointer(at), value.low_byte(), count as usize * T::BYTES) }
        } else {
            for i in 0..count {
                // SAFETY: inside the frame's page, as asserted.
                unsafe { store(at + i * T::BYTES as u64, value) }
            }
        }
    }

    /// Atomically replaces `old` by `new` at an offset; otherwise gives what is there.
    pub fn compare_exchange<T: Cell>(&self, frame: Frame, offset: u64, old: T, new: T) -> Result<(), T> {
        assert!(frame.writable && offset + T::BYTES as u64 <= PAGE + 1);
        // SAFETY: inside the frame's page, whose memory `self` keeps, and which may be written.
        unsafe { T::cas(frame.host + offset, old, new) }
    }

    /// As [`Frames::compare_exchange`] for 16 aligned bytes.
    pub fn compare_exchange_16(&self, frame: Frame, offset: u64, old: u128, new: u128) -> Result<(), u128> {
        assert!(frame.writable && offset + 16 <= PAGE + 1 && offset.is_multiple_of(16));
        // SAFETY: inside the frame's page, aligned to 16 bytes.
        unsafe { cas_16(frame.host + offset, old, new) }
    }
}

/// An integer that guest memory holds.
pub trait Cell: Int {
    /// Compares and exchanges at a host address.
    ///
    /// # Safety
    /// The address is valid for reads and writes of the type; it need not be aligned.
    #[doc(hidden)]
    unsafe fn cas(address: u64, old: Self, new: Self) -> Result<(), Self>;

    fn low_byte(self) -> u8 {
        self.to_u64() as u8
    }

    /// All bytes are the same.
    fn bytes_equal(self) -> bool {
        let repeated = u64::from(self.low_byte()).wrapping_mul(0x0101_0101_0101_0101);
        T64::mask(Self::BITS) & repeated == self.to_u64()
    }
}

struct T64;
impl T64 {
    const fn mask(bits: u32) -> u64 {
        u64::MAX >> (64 - bits)
    }
}

macro_rules! cell {
    ($($t:ty, $atomic:ty, $reg:tt, $a:tt, $d:literal;)*) => { $(
        impl Cell for $t {
            #[inline(always)]
            unsafe fn cas(address: u64, old: Self, new: Self) -> Result<(), Self> {
                let p: *mut $t = pointer(address).cast();
                if p.is_aligned() {
                    // SAFETY: valid by the caller's promise, aligned as just checked; guest memory is only reached by copies.
                    let cell = unsafe { <$atomic>::from_ptr(p) };
                    return cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).map(|_| ());
                }
                let found: $t;
                // SAFETY: valid by the caller's promise. The processor locks operands that are not aligned, too.
                unsafe {
                    std::arch::asm!(
                        concat!("lock cmpxchg [{p}], {new", $d, "}"),
                        p = in(reg) p,
                        new = in($reg) new,
                        inout($a) old => found,
                        options(nostack),
                    );
                }
                if found == old { Ok(()) } else { Err(found) }
            }
        }
    )* };
}
cell! {
    u8, AtomicU8, reg_byte, "al", "";
    u16, AtomicU16, reg, "ax", ":x";
    u32, AtomicU32, reg, "eax", ":e";
    u64, AtomicU64, reg, "rax", ":r";
}

/// # Safety
/// The address is valid for reads and writes of 16 bytes and aligned to 16.
unsafe fn cas_16(address: u64, old: u128, new: u128) -> Result<(), u128> {
    let (mut lo, mut hi) = (old as u64, (old >> 64) as u64);
    // SAFETY: valid and aligned by the caller's promise; rbx is preserved around its use.
    unsafe {
        std::arch::asm!(
            "xchg {b}, rbx",
            "lock cmpxchg16b [{p}]",
            "mov rbx, {b}",
            p = in(reg) address,
            b = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") lo,
            inout("rdx") hi,
            options(nostack),
        );
    }
    let found = u128::from(hi) << 64 | u128::from(lo);
    if found == old { Ok(()) } else { Err(found) }
}

#[inline(always)]
fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// # Safety
/// The address is valid for reads of `T`.
#[inline(always)]
unsafe fn load<T: Copy>(address: u64) -> T {
    // SAFETY: valid by the caller's promise. Volatile: other vCPUs change guest memory at any time, and each guest access is
    // one host access.
    unsafe { std::ptr::read_volatile(pointer(address).cast::<Unaligned<T>>()).0 }
}

/// # Safety
/// The address is valid for writes of `T`.
#[inline(always)]
unsafe fn store<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `load`.
    unsafe { std::ptr::write_volatile(pointer(address).cast::<Unaligned<T>>(), Unaligned(value)) }
}

/// # Safety
/// Both addresses are valid for an element of `size` bytes: 1, 2, 4 or 8.
#[inline(always)]
unsafe fn move_element(to: u64, from: u64, size: u64) {
    // SAFETY: valid by the caller's promise.
    unsafe {
        match size {
            1 => store(to, load::<u8>(from)),
            2 => store(to, load::<u16>(from)),
            4 => store(to, load::<u32>(from)),
            _ => store(to, load::<u64>(from)),
        }
    }
}

/// What the hot part of an entry leaves out.
#[derive(Clone, Copy, Default)]
struct Meta {
    live: bool,
    global: bool,
    /// The index stands in the list of global entries, or of others.
    in_global: bool,
    in_local: bool,
    /// Linear page address.
    page: u64,
}

/// An address space and what is kept for it alone.
struct Space {
    view: View,
    /// The user bank's entries.
    meta: Box<[Meta]>,
    /// Indexes of entries of the user's bank that may be live.
    live: Vec<u16>,
    /// Translations of other banks that are not global, while another space is at work.
    parked: Vec<(u16, u64, Entry)>,
    pcid: Option<u16>,
    /// When it was last gone to.
    used: u64,
}

/// Most entries that are parked for a space.
const MOST_PARKED: usize = 256;

impl Space {
    fn new(memory: &OwnedFd, n: usize) -> Result<Self, Errno> {
        let mut view = View::new(memory, n)?;
        let from = if n == 0 { 0 } else { Bank::User as usize };
        let to = if n == 0 { 4 * ENTRIES } else { from + ENTRIES };
        for (i, entry) in view.0.entries_mut().iter_mut().enumerate().take(to).skip(from) {
            *entry = Entry::none(i);
        }
        Ok(Self {
            view,
            meta: vec![Meta::default(); ENTRIES].into(),
            live: Vec::new(),
            parked: Vec::new(),
            pcid: None,
            used: 0,
        })
    }

    /// Drops all that is kept for it alone.
    fn clear(&mut self) {
        self.parked.clear();
        let entries = self.view.0.entries_mut();
        for index in self.live.drain(..) {
            let index = usize::from(index);
            entries[index] = Entry::none(index);
            self.meta[index % ENTRIES] = Meta::default();
        }
    }
}

/// The translations of one vCPU.
pub struct Tlb {
    spaces: Vec<Space>,
    /// The one at work, and its view.
    space: usize,
    area: AreaRef,
    memory: OwnedFd,
    /// Of all banks; the user's part is not used.
    meta: Box<[Meta]>,
    /// Indexes of entries outside the user's bank that may be live, so that a flush costs what was filled.
    global: Vec<u16>,
    local: Vec<u16>,
    losses: u64,
    /// Changes of the address space.
    changes: u64,
    /// User pages were global at some time.
    global_users: bool,
}

impl Default for Tlb {
    fn default() -> Self {
        let made = || {
            let memory = memfd_create("tlb", MemfdFlags::CLOEXEC)?;
            ftruncate(&memory, (size_of::<Area>() + (SPACES - 1) * OWN_BYTES) as u64)?;
            Ok::<_, Errno>((Space::new(&memory, 0)?, memory))
        };
        let Ok((first, memory)) = made() else { std::alloc::handle_alloc_error(Layout::new::<Area>()) };
        Self {
            area: first.view.0,
            spaces: vec![first],
            space: 0,
            memory,
            meta: vec![Meta::default(); 4 * ENTRIES].into(),
            global: Vec::new(),
            local: Vec::new(),
            losses: 0,
            changes: 0,
            global_users: false,
        }
    }
}

impl Entry {
    /// The host address of a linear address in the page.
    #[inline(always)]
    const fn host(&self, linear: u64) -> u64 {
        linear.wrapping_add(self.delta)
    }

    const fn none(index: usize) -> Self {
        Self { read: no_tag(index), write: no_tag(index), exec: no_tag(index), delta: 0 }
    }
}

/// Index of a linear address in a bank.
#[inline(always)]
fn slot(bank: Bank, linear: u64) -> usize {
    (bank as usize | (linear >> 12) as usize & (ENTRIES - 1)) & (4 * ENTRIES - 1)
}

impl Tlb {
    /// Where the engine's bytes start ([`ENGINE_BYTES`], zeroed at first) in the view of the address space at work; the entries of
    /// all banks follow.
    pub fn area(&mut self) -> NonNull<u8> {
        self.area.0.cast()
    }

    /// The number of the address space at work, below [`SPACES`].
    pub fn space(&self) -> usize {
        self.space
    }

    /// The area as another address space sees it, if that has been gone to yet.
    pub fn area_of(&mut self, space: usize) -> Option<NonNull<u8>> {
        self.spaces.get(space).map(|s| s.view.0.0.cast())
    }

    #[inline(always)]
    fn meta(&mut self, index: usize) -> &mut Meta {
        if index / ENTRIES == 1 {
            &mut self.spaces[self.space].meta[index % ENTRIES]
        } else {
            &mut self.meta[index]
        }
    }

    /// Reads, if a translation allows.
    #[inline(always)]
    pub fn read<T: Cell>(&self, bank: Bank, linear: u64) -> Option<T> {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.read;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return None;
        }
        // SAFETY: a read tag stands only in entries filled from a frame, and the whole access lies in its page. The entry is
        // dropped before the frame's memory is.
        Some(unsafe { load(e.host(linear)) })
    }

    /// Writes, if a translation allows.
    #[inline(always)]
    pub fn write<T: Cell>(&self, bank: Bank, linear: u64, value: T) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.write;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return false;
        }
        // SAFETY: as in `read`; a write tag stands only for frames that may be written.
        unsafe { store(e.host(linear), value) };
        true
    }

    /// Whether a write of up to a page's size would hit.
    #[inline(always)]
    pub fn writable(&self, bank: Bank, linear: u64, size: u64) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        size <= PAGE + 1 && linear ^ e.write <= PAGE + 1 - size
    }

    /// Replaces a value by `change` of it, if a translation allows.
    #[inline(always)]
    pub fn update<T: Cell>(&self, bank: Bank, linear: u64, change: impl FnOnce(T) -> T) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.write;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return false;
        }
        let address = e.host(linear);
        // SAFETY: as in `write`; what can be written can be read.
        unsafe { store(address, change(load(address))) };
        true
    }

    /// Atomic compare-exchange, if a translation allows.
    #[inline(always)]
    pub fn compare_exchange<T: Cell>(
        &self,
        bank: Bank,
        linear: u64,
        old: T,
        new: T,
    ) -> Option<Result<(), T>> {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.write;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return None;
        }
        // SAFETY: as in `write`.
        Some(unsafe { T::cas(e.host(linear), old, new) })
    }

    /// Whether code at `linear` may be fetched by a translation made before; gives the frame's key plus the offset.
    #[inline(always)]
    pub fn fetch(&self, bank: Bank, linear: u64) -> Option<u64> {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.exec;
        (offset <= PAGE).then(|| e.host(linear))
    }

    /// Whether a translation for reads, or for writes, is there.
    pub fn holds(&self, bank: Bank, linear: u64, write: bool) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        (if write { e.write } else { e.read }) == linear & !PAGE
    }

    /// The host address of a page that may be written.
    pub fn host_page(&self, bank: Bank, page: u64) -> Option<u64> {
        let e = &self.area.entries()[slot(bank, page)];
        (e.write == page).then(|| e.host(page))
    }

    /// Whether the translation of code at `linear` is global.
    pub fn is_global(&self, bank: Bank, linear: u64) -> bool {
        let index = slot(bank, linear);
        let meta = if bank == Bank::User {
            &self.spaces[self.space].meta[index % ENTRIES]
        } else {
            &self.meta[index]
        };
        meta.live && meta.global
    }

    /// Counts what took translations away.
    pub fn losses(&self) -> u64 {
        self.losses
    }

    /// Enters a translation of `linear`'s page for one kind of access.
    pub fn fill(&mut self, bank: Bank, linear: u64, frame: Frame, global: bool, kind: crate::paging::Kind) {
        if bank == Bank::Slow {
            return;
        }
        let index = slot(bank, linear);
        let page = linear & !PAGE;
        let delta = frame.host.wrapping_sub(page);
        let same = self.area.entries()[index].delta == delta;
        let meta = self.meta(index);
        let kept = meta.live && meta.page == page && same;
        let global = global && (meta.global || !kept);
        let listed = if bank == Bank::User || !global { &mut meta.in_local } else { &mut meta.in_global };
        let new = !std::mem::replace(listed, true);
        *meta = Meta { live: true, global, page, ..*meta };
        if new {
            if bank == Bank::User {
                self.global_users |= global;
                self.spaces[self.space].live.push(index as u16);
            } else if global {
                self.global.push(index as u16);
            } else {
                self.local.push(index as u16);
            }
        }
        let entry = &mut self.area.entries_mut()[index];
        if !kept {
            *entry = Entry { delta, ..Entry::none(index) };
        }
        match kind {
            crate::paging::Kind::Read => entry.read = page,
            crate::paging::Kind::Write if frame.writable => {
                entry.write = page;
                entry.read = page;
            }
            crate::paging::Kind::Write => {}
            crate::paging::Kind::Fetch => entry.exec = page,
        }
    }

    /// Drops the entries outside the user's bank that are not global; `park` is told of those that were live.
    fn drop_local(&mut self, mut park: impl FnMut(u16, u64, Entry)) {
        let entries = self.area.entries_mut();
        for number in self.local.drain(..) {
            let index = usize::from(number);
            let meta = &mut self.meta[index];
            meta.in_local = false;
            if meta.live && !meta.global {
                park(number, meta.page, entries[index]);
                meta.live = false;
                entries[index] = Entry::none(index);
            }
        }
    }

    /// Drops all translations of all address spaces, or (`keep_global`) those of the space at work that are not global.
    pub fn flush(&mut self, keep_global: bool) {
        self.losses += 1;
        self.drop_local(|_, _, _| ());
        if keep_global {
            self.spaces[self.space].clear();
            return;
        }
        for space in &mut self.spaces {
            space.clear();
            space.pcid = None;
        }
        let entries = self.area.entries_mut();
        for index in self.global.drain(..) {
            let index = usize::from(index);
            self.meta[index] = Meta::default();
            entries[index] = Entry::none(index);
        }
        self.global_users = false;
    }

    /// Goes from the address space `old` to `new`, and drops what is known of that unless `keep`. Gives the numbers of spaces whose
    /// user translations were dropped as a bit mask.
    pub fn change_space(&mut self, old: u16, new: u16, keep: bool) -> u32 {
        self.losses += 1;
        self.changes += 1;
        let mut dropped = 0;
        if self.spaces[self.space].pcid != Some(old) {
            // Everything was dropped since the space was gone to; it belongs to whoever is at work now.
            dropped = self.forget_spaces(Some(old));
            self.spaces[self.space].pcid = Some(old);
        }
        let mut parked = std::mem::take(&mut self.spaces[self.space].parked);
        parked.clear();
        self.drop_local(|index, page, entry| {
            if page != NO_PAGE && parked.len() < MOST_PARKED {
                parked.push((index, page, entry));
            }
        });
        self.spaces[self.space].parked = parked;
        self.spaces[self.space].used = self.changes;
        let known = self.spaces.iter().position(|s| s.pcid == Some(new));
        let to = match known {
            Some(n) => n,
            None if self.spaces.len() < SPACES => match Space::new(&self.memory, self.spaces.len()) {
                Ok(space) => {
                    self.spaces.push(space);
                    self.spaces.len() - 1
                }
                // The host is short of memory: one space must do.
                Err(_) => self.space,
            },
            None => (0..self.spaces.len()).min_by_key(|&n| self.spaces[n].used).unwrap_or(self.space),
        };
        self.space = to;
        self.area = self.spaces[to].view.0;
        let space = &mut self.spaces[to];
        space.pcid = Some(new);
        space.used = self.changes;
        if known.is_none() || !keep {
            space.clear();
            return dropped | 1 << to;
        }
        let entries = space.view.0.entries_mut();
        for (number, page, entry) in space.parked.drain(..) {
            let index = usize::from(number);
            let meta = &mut self.meta[index];
            if !meta.live {
                let listed = std::mem::replace(&mut meta.in_local, true);
                *meta = Meta { live: true, global: false, page, ..*meta };
                entries[index] = entry;
                if !listed {
                    self.local.push(number);
                }
            }
        }
        dropped
    }

    /// Drops what is known of address spaces but the one at work: of one, or all. Gives their numbers as a bit mask.
    pub fn forget_spaces(&mut self, pcid: Option<u16>) -> u32 {
        let current = self.space;
        let mut mask = 0;
        for (n, space) in self.spaces.iter_mut().enumerate() {
            if n != current && pcid.is_none_or(|p| space.pcid == Some(p)) {
                space.clear();
                space.pcid = None;
                mask |= 1 << n;
            }
        }
        mask
    }

    /// Drops the translations of one page. Gives the numbers of other address spaces that were dropped as a bit mask.
    pub fn flush_page(&mut self, linear: u64) -> u32 {
        self.losses += 1;
        let page = linear & !PAGE;
        for bank in [Bank::Supervisor, Bank::User, Bank::Override] {
            let index = slot(bank, linear);
            let meta = self.meta(index);
            if meta.live && meta.page == page {
                // The index stays in its list; the entry is dead and harmless there.
                meta.page = NO_PAGE;
                self.area.entries_mut()[index] = Entry::none(index);
            }
        }
        // A global page is all address spaces'.
        if self.global_users { self.forget_spaces(None) } else { 0 }
    }

    /// Takes the write permission from all translations to a frame.
    pub fn drop_writes(&mut self, frame: Frame) {
        self.losses += 1;
        // Tags hold page addresses; an entry without any has nothing to lose.
        let drop = |entries: &mut [Entry; 4 * ENTRIES], index: u16| {
            let index = usize::from(index);
            let page = entries[index].write;
            if entries[index].host(page) == frame.host {
                entries[index].write = no_tag(index);
            }
        };
        for space in &mut self.spaces {
            for (index, page, entry) in &mut space.parked {
                if entry.host(*page) == frame.host {
                    entry.write = no_tag(usize::from(*index));
                }
            }
            for &index in &space.live {
                drop(space.view.0.entries_mut(), index);
            }
        }
        let entries = self.area.entries_mut();
        for &index in self.global.iter().chain(&self.local) {
            drop(entries, index);
        }
    }
}
