//! System calls and registers for which the libraries have no safe form.
#![allow(unsafe_code)] // shared kvm_run pages, signals, RDTSC, raw ioctls

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_IRQ_ROUTING_MSI, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KvmIrqRouting, kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_device_attr, kvm_interrupt,
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio, kvm_irq_routing_entry, kvm_run, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use pdm::doorbell::Place;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The first page of a vCPU's kvm_run area, mapped once more: the part that other threads write.
pub(crate) struct RunPage {
    base: NonNull<u8>,
}

const PAGE: usize = 4096;
/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
/// `_IOW(KVMIO, 0x79, struct kvm_ioeventfd)`; the library wants an event of a library of its own.
const KVM_IOEVENTFD: libc::c_ulong = 0x4040_ae79;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)` and `_IOW(KVMIO, 0xe3, …)`; the library has them for other architectures only.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_HAS_DEVICE_ATTR: libc::c_ulong = 0x4018_aee3;

// SAFETY: the page is only accessed as atomics and volatile bytes.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        Ok(Self { base: map_page(vcpu, 0)? })
    }

    /// Lets KVM_RUN run. Returns whether it was to return at once.
    pub(crate) fn take_immediate_exit(&self) -> bool {
        // SAFETY: as below.
        let byte = unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        // Others set it seldom: mostly a plain read will do.
        byte.load(Ordering::SeqCst) != 0 && byte.swap(0, Ordering::SeqCst) != 0
    }

    /// Whether KVM_RUN is to return at once.
    pub(crate) fn set_immediate_exit(&self, exit: bool) {
        // SAFETY: the byte lies within the mapped page, which lives as long as `self`.
        let byte = unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        byte.store(u8::from(exit), Ordering::SeqCst);
    }

    /// Bytes per item of the port access that KVM_RUN has just returned with.
    pub(crate) fn port_access_size(&self) -> u8 {
        // The union begins with the direction, followed by the size.
        const SIZE: usize = offset_of!(kvm_run, __bindgen_anon_1) + 1;
        // SAFETY: the byte lies within the mapped page.
        unsafe { self.base.as_ptr().add(SIZE).read_volatile() }
    }

    /// Sub-code and data of an internal error that KVM_RUN has just returned with.
    pub(crate) fn internal_error(&self) -> (u32, Vec<u64>) {
        const AT: usize = offset_of!(kvm_run, __bindgen_anon_1);
        // SAFETY: code, count and 16 words lie within the mapped page; the union is aligned to 8.
        unsafe {
            let at = self.base.as_ptr().add(AT);
            let code = at.cast::<u32>().read_volatile();
            let count = at.add(4).cast::<u32>().read_volatile().min(16) as usize;
            (code, (0..count).map(|n| at.add(8 + 8 * n).cast::<u64>().read_volatile()).collect())
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), PAGE) };
    }
}

/// The ring in which KVM leaves writes that it has held back, shared by all vCPUs of a VM. KVM writes entries and `last`; the one reader
/// moves `first`.
pub(crate) struct Ring {
    base: NonNull<u8>,
}

// SAFETY: the page is only accessed as atomics and volatile reads.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    const ENTRIES: u32 =
        ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as u64;
        Ok(Self { base: map_page(vcpu, offset)? })
    }

    fn counter(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the aligned word lies within the mapped page, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        let first = self.counter(offset_of!(kvm_coalesced_mmio_ring, first)).load(Ordering::Acquire);
        first == self.counter(offset_of!(kvm_coalesced_mmio_ring, last)).load(Ordering::Acquire)
    }

    /// The oldest write, which stays until [`Ring::advance`]: address, bytes, and how many of them count.
    pub(crate) fn oldest(&self) -> Option<(u64, [u8; 8], usize)> {
        if self.is_empty() {
            return None;
        }
        let first = self.counter(offset_of!(kvm_coalesced_mmio_ring, first)).load(Ordering::Relaxed);
        let at = offset_of!(kvm_coalesced_mmio_ring, coalesced_mmio)
            + (first % Self::ENTRIES) as usize * size_of::<kvm_coalesced_mmio>();
        // SAFETY: the entry lies within the page, and KVM does not touch it before `first` has moved on.
        let entry: kvm_coalesced_mmio =
            unsafe { self.base.as_ptr().add(at).cast::<kvm_coalesced_mmio>().read_volatile() };
        Some((entry.phys_addr, entry.data, (entry.len as usize).min(entry.data.len())))
    }

    /// The oldest write has been made.
    pub(crate) fn advance(&self) {
        let first = self.counter(offset_of!(kvm_coalesced_mmio_ring, first));
        first.store((first.load(Ordering::Relaxed) + 1) % Self::ENTRIES, Ordering::Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), PAGE) };
    }
}

/// Maps a page of what a vCPU shares with user processes.
fn map_page(vcpu: &VcpuFd, offset: u64) -> io::Result<NonNull<u8>> {
    // SAFETY: the descriptor of a vCPU stays open during the call.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh shared mapping at an address of the kernel's choice.
    let base = unsafe { mmap(std::ptr::null_mut(), PAGE, access, MapFlags::SHARED, fd.as_fd(), offset)? };
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned null"))
}

/// Queues an external interrupt for delivery at the next entry.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let argument = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's, and the argument is what this ioctl reads.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has KVM write to `event` where the guest writes to `place`, or not any more.
pub(crate) fn set_ioevent(vm: &VmFd, event: BorrowedFd<'_>, place: Place, on: bool) -> io::Result<()> {
    let flag = |bit: u32| 1u32 << bit;
    let (addr, len, datamatch, flags) = match place {
        Place::Port(port, value) => (
            u64::from(port.0),
            2,
            u64::from(value),
            flag(kvm_ioeventfd_flag_nr_pio) | flag(kvm_ioeventfd_flag_nr_datamatch),
        ),
        // Of any width.
        Place::Memory(address) => (address.0, 0, 0, 0),
    };
    let flags = if on { flags } else { flags | flag(kvm_ioeventfd_flag_nr_deassign) };
    let argument = kvm_ioeventfd { datamatch, addr, len, fd: event.as_raw_fd(), flags, ..Default::default() };
    // SAFETY: the descriptor is a VM's, and the argument is what this ioctl reads.
    let result = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IOEVENTFD, &argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The attribute of a vCPU that is its counter's offset.
fn tsc_offset(offset: &u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_ref(offset) as u64,
        flags: 0,
    }
}

/// Whether the counter's offset can be set.
pub(crate) fn has_tsc_offset(vcpu: &VcpuFd) -> bool {
    let place = 0;
    let attribute = tsc_offset(&place);
    // SAFETY: the descriptor is a vCPU's, and the argument is what this ioctl reads.
    unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR, &attribute) == 0 }
}

/// Gives the vCPU's time-stamp counter its distance from the host's.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = tsc_offset(&offset);
    // SAFETY: as above; the kernel reads the eight bytes of `offset` during the call.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &attribute) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets, changes or (with size 0) removes a memory slot.
///
/// # Safety
/// The region must be memory that stays mapped until the slot is removed or the VM's last descriptor is closed.
pub(crate) unsafe fn set_slot(
    vm: &VmFd,
    region: kvm_userspace_memory_region,
) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: passed on to the caller.
    unsafe { vm.set_user_memory_region(region) }
}

/// Gives KVM the x87, SSE and AVX state.
pub(crate) fn set_xsave(vcpu: &VcpuFd, area: &kvm_bindings::kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: KVM reads 4096 bytes, since components beyond them (AMX) are never enabled for guests here.
    unsafe { vcpu.set_xsave(area) }
}

/// Inputs of the I/O APIC, for which KVM reserves its first interrupt routes.
pub(crate) const ROUTES: u32 = 24;

/// Tells KVM where the I/O APIC's inputs lead, as message-signalled interrupts: it then exits at the end of those that are level-triggered.
pub(crate) fn set_routes(vm: &VmFd, routes: &[(u64, u32)]) -> Result<(), kvm_ioctls::Error> {
    let entries: Vec<_> = routes
        .iter()
        .zip(0..ROUTES)
        .map(|(&(address, data), gsi)| {
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = address as u32;
            entry.u.msi.address_hi = (address >> 32) as u32;
            entry.u.msi.data = data;
            entry
        })
        .collect();
    let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vm.set_gsi_routing(&table)
}

/// The host's time-stamp counter.
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has the counter, and Linux leaves it readable.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Nanoseconds of the host's clock that nobody slews, which KVM reckons with where the time-stamp counter cannot be relied on.
pub(crate) fn monotonic_raw() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// The calling thread's number.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}

extern "C" fn ignore(_: libc::c_int) {}

/// The signal that fetches a thread out of KVM_RUN.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

/// Makes the signal do nothing but interrupt. Without SA_RESTART, so that it does.
pub(crate) fn install_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid, and the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(signal(), &action, std::ptr::null_mut());
        }
    });
}

/// Sends the signal to a thread of this process; nothing happens if it has ended.
pub(crate) fn send_signal(thread: i32) {
    // SAFETY: sends a signal that this process handles.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
}
