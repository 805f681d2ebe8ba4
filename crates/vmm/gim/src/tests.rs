use std::sync::atomic::AtomicU64;

use cpum::cpuid::Paravirt;
use cpum::state::{cr0, efer, gpr, seg};
use em::Gim as _;
use pdm::connector::SystemRequest;
use pgm::{Backing, HostMemory, Layer};
use vbox_types::ByteSize;

use super::*;

const RAM: u64 = 0x10_0000;
const TSC: Hz = Hz(2_400_000_000);
/// 2026-01-01 and 5 ns.
const UTC: i64 = 1_767_225_600_000_000_005;

#[derive(Default)]
struct Resets(AtomicU32);
impl SystemControl for Resets {
    fn request(&self, _: SystemRequest) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Board {
    gim: Arc<Gim>,
    pgm: Arc<Pgm>,
    clock: Arc<Clock>,
    links: Vec<Arc<VcpuLink>>,
    resets: Arc<Resets>,
    /// What the threads have waited for a CPU.
    waited: Arc<AtomicU64>,
    crashes: Arc<Mutex<Vec<Crash>>>,
}

impl Board {
    fn new(provider: Provider) -> Self {
        Self::with(&setup(provider))
    }

    fn with(setup: &Setup) -> Self {
        let links: Vec<_> = (0..2).map(|_| Arc::new(VcpuLink::default())).collect();
        let pgm = Pgm::new(links.clone());
        let ram = Arc::new(HostMemory::new("test", ByteSize(RAM)).unwrap());
        pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
        let clock = Clock::manual();
        let resets = Arc::new(Resets::default());
        let waited = Arc::new(AtomicU64::new(1_000_000));
        let told = waited.clone();
        let crashes = Arc::new(Mutex::new(Vec::new()));
        let met = crashes.clone();
        let wiring = Wiring {
            pgm: pgm.clone(),
            clock: clock.clone(),
            links: links.clone(),
            utc: Box::new(|| UTC),
            control: resets.clone(),
            amd: false,
            crashed: Box::new(move |crash| met.lock().push(*crash)),
            stolen: Some(Box::new(move || told.load(Ordering::SeqCst))),
        };
        let gim = Gim::new(setup, wiring).unwrap();
        Self { gim, pgm, clock, links, resets, waited, crashes }
    }

    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.pgm.read(GuestPhys(at), &mut out);
        out
    }

    fn u32_at(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64_at(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    /// What a Linux guest reads from the record at `at` with its counter at `tsc`.
    fn kvm_clock(&self, at: u64, tsc: u64) -> u64 {
        assert_eq!(self.u32_at(at) & 1, 0, "the version is even");
        let shift = self.bytes::<1>(at + 28)[0] as i8;
        let delta = tsc.wrapping_sub(self.u64_at(at + 8));
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        let nanos = (u128::from(delta) * u128::from(self.u32_at(at + 24))) >> 32;
        nanos as u64 + self.u64_at(at + 16)
    }
}

fn setup(provider: Provider) -> Setup {
    Setup {
        provider,
        vcpus: 2,
        tsc_frequency: TSC,
        apic_frequency: Hz(1_000_000_000),
        x2apic: false,
        hypercalls: true,
        kvm: KvmFeatures { kick: true, end_of_interrupt: true, steal_time: true },
        stable_counter: true,
        hyperv_vendor: hyperv_vendor(),
    }
}

fn leaf_of(provider: Provider, number: u32) -> Leaf {
    match setup(provider).cpuid() {
        Paravirt::None => Leaf::default(),
        Paravirt::Shown(list) => list.iter().find(|e| e.leaf == number).map_or(Leaf::default(), |e| e.value),
    }
}

/// A vCPU in 64-bit code at privilege level 0.
fn cpu(id: u32) -> CpuState {
    let mut cpu = CpuState::reset(id);
    cpu.cr0 |= cr0::PE | cr0::PG;
    cpu.msr.efer = efer::LME | efer::LMA;
    cpu.seg[seg::CS].attr.set_long(true);
    cpu
}

#[test]
fn the_signatures_are_those_that_guests_look_for() {
    assert_eq!(setup(Provider::None).cpuid(), Paravirt::None);
    let kvm = leaf_of(Provider::Kvm, 0x4000_0000);
    assert_eq!((kvm.eax, kvm.ebx, kvm.edx), (0x4000_0001, 0x4b4d_564b, 0x4d));
    let hyperv = leaf_of(Provider::HyperV, 0x4000_0000);
    assert_eq!((hyperv.ebx, hyperv.ecx, hyperv.edx), (0x7263_694d, 0x666f_736f, 0x7648_2074));
    assert_eq!(leaf_of(Provider::HyperV, 0x4000_0001).eax, 0x3123_7648);
    let timing = leaf_of(Provider::Minimal, 0x4000_0010);
    assert_eq!((timing.eax, timing.ebx), (2_400_000, 1_000_000));
}

#[test]
fn parts_of_the_kvm_provider_are_offered_only_where_the_engine_has_them() {
    let features = |kvm| match (Setup { kvm, ..setup(Provider::Kvm) }).cpuid() {
        Paravirt::Shown(list) => list[1].value.eax,
        Paravirt::None => 0,
    };
    let none = KvmFeatures::default();
    let added = |kvm| features(kvm) ^ features(none);
    assert_eq!(added(KvmFeatures { kick: true, ..none }), 1 << 7);
    assert_eq!(added(KvmFeatures { end_of_interrupt: true, ..none }), 1 << 6);
    assert_eq!(added(KvmFeatures { steal_time: true, ..none }), 1 << 5);
}

#[test]
fn stolen_time_grows_by_what_the_thread_waited_and_is_told_now_and_then() {
    let board = Board::new(Provider::Kvm);
    assert!(!board.gim.write_msr(&cpu(1), 0x4b56_4d03, 0x2003), "reserved bits");
    assert!(board.gim.write_msr(&cpu(1), 0x4b56_4d03, 0x2001));
    let record = || {
        let [steal, version] = [0, 8].map(|at| u64::from_le_bytes(board.bytes::<8>(0x2000 + at)));
        (steal, version as u32)
    };
    board.gim.about_to_run(VcpuId(1));
    let (first, version) = record();
    assert_eq!((first, version & 1), (0, 0));
    // Not again within a few milliseconds.
    board.waited.fetch_add(700, Ordering::SeqCst);
    board.gim.about_to_run(VcpuId(1));
    assert_eq!(record(), (0, version));
    board.clock.advance(10_000_000);
    board.gim.about_to_run(VcpuId(1));
    assert_eq!(record(), (700, version + 2));
    // The other vCPU has no record.
    board.gim.about_to_run(VcpuId(0));
    assert_eq!(board.bytes::<4>(0), [0; 4]);
}

#[test]
fn the_kvm_clock_is_virtual_time_on_every_vcpu() {
    let board = Board::new(Provider::Kvm);
    let mut second = cpu(1);
    second.msr.tsc_offset = 7_000_000u64.wrapping_neg();
    assert!(board.gim.write_msr(&cpu(0), 0x4b56_4d01, 0x1000 | 1));
    assert!(board.gim.write_msr(&second, 0x4b56_4d01, 0x1040 | 1));
    assert_eq!(board.bytes::<1>(0x101d), [1], "the stable flag is set");
    // Thirty days, in which errors would have added up.
    board.clock.advance(30 * 86_400 * 1_000_000_000);
    let tsc = tm::ticks(board.clock.now(), TSC.0);
    for (at, offset) in [(0x1000, 0), (0x1040, second.msr.tsc_offset)] {
        let told = board.kvm_clock(at, tsc.wrapping_add(offset));
        assert!(told.abs_diff(board.clock.now()) < 1_000_000, "{told}");
    }
}

#[test]
fn a_moved_counter_takes_its_kvm_clock_along() {
    let board = Board::new(Provider::Kvm);
    let mut cpu = cpu(0);
    assert!(board.gim.write_msr(&cpu, 0x12, 0x2000 | 1));
    board.clock.advance(5_000_000_000);
    cpu.msr.tsc_offset = 1 << 40;
    board.gim.tsc_moved(&cpu);
    let tsc = tm::ticks(board.clock.now(), TSC.0) + (1 << 40);
    assert!(board.kvm_clock(0x2000, tsc).abs_diff(5_000_000_000) < 10);
}

#[test]
fn the_scale_is_exact_for_slow_and_fast_counters() {
    for hz in [100_000_000u64, 999_999_999, 1_000_000_000, 2_000_000_000, 2_593_906_123, 5_800_000_000] {
        let scale = kvm::Scale::new(Hz(hz));
        let ticks = u128::from(hz) * 1000;
        let shifted = if scale.shift < 0 { ticks >> -scale.shift } else { ticks << scale.shift };
        let nanos = (shifted * u128::from(scale.multiplier)) >> 32;
        assert!(nanos.abs_diff(1_000_000_000_000) < 500, "{hz} Hz: {nanos}");
    }
}

#[test]
fn a_disabled_kvm_clock_is_not_written() {
    let board = Board::new(Provider::Kvm);
    assert!(board.gim.write_msr(&cpu(0), 0x4b56_4d01, 0x1000));
    assert_eq!(board.bytes::<32>(0x1000), [0; 32]);
}

#[test]
fn the_wall_clock_tells_when_virtual_time_began() {
    let board = Board::new(Provider::Kvm);
    board.clock.advance(2_000_000_000);
    assert!(board.gim.write_msr(&cpu(0), 0x4b56_4d00, 0x3000));
    assert_eq!((board.u32_at(0x3000) & 1, board.u32_at(0x3004), board.u32_at(0x3008)), (0, 1_767_225_598, 5));
}

#[test]
fn registers_of_what_is_not_announced_fault() {
    let board = Board::with(&Setup { kvm: KvmFeatures::default(), ..setup(Provider::Kvm) });
    for number in [0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04, 0x4000_0020] {
        assert_eq!(board.gim.read_msr(VcpuId(0), number), None);
        assert!(!board.gim.write_msr(&cpu(0), number, 1));
    }
}

#[test]
fn a_kick_reaches_the_vcpu_it_names() {
    let board = Board::new(Provider::Kvm);
    let mut caller = cpu(0);
    (caller.gpr[gpr::RAX], caller.gpr[gpr::RCX]) = (5, 1);
    assert!(board.gim.hypercall(&mut caller));
    assert_eq!(caller.gpr[gpr::RAX], 0);
    assert_eq!((board.links[0].take_kick(), board.links[1].take_kick()), (false, true));
    // Beyond the machine's vCPUs nothing happens.
    (caller.gpr[gpr::RAX], caller.gpr[gpr::RCX]) = (5, 99);
    assert!(board.gim.hypercall(&mut caller));
}

#[test]
fn unknown_and_unprivileged_kvm_calls_get_their_errors() {
    let board = Board::new(Provider::Kvm);
    let mut caller = cpu(0);
    caller.gpr[gpr::RAX] = 77;
    assert!(board.gim.hypercall(&mut caller));
    assert_eq!(caller.gpr[gpr::RAX] as i64, -1000);
    caller.seg[seg::SS].attr.set_dpl(3);
    caller.gpr[gpr::RAX] = 5;
    assert!(board.gim.hypercall(&mut caller));
    assert_eq!(caller.gpr[gpr::RAX] as i64, -1);
}

#[test]
fn hyperv_reference_time_is_the_same_from_page_and_register() {
    let board = Board::new(Provider::HyperV);
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0021, 0x5000 | 1));
    assert_ne!(board.u32_at(0x5000), 0);
    board.clock.advance(86_400 * 1_000_000_000);
    let tsc = tm::ticks(board.clock.now(), TSC.0);
    let page = ((u128::from(tsc) * u128::from(board.u64_at(0x5008))) >> 64) as u64 + board.u64_at(0x5010);
    let register = board.gim.read_msr(VcpuId(1), 0x4000_0020).unwrap();
    assert_eq!(register, 864_000_000_000);
    assert!(page.abs_diff(register) <= 1, "{page}");
}

#[test]
fn where_counters_differ_guests_are_not_told_to_trust_them() {
    let setup = |provider| Setup { stable_counter: false, ..setup(provider) };
    let Paravirt::Shown(leaves) = setup(Provider::Kvm).cpuid() else { panic!("KVM shows leaves") };
    assert_eq!(leaves[1].value.eax >> 24 & 1, 0);
    for (provider, register) in [(Provider::Kvm, 0x4b56_4d01), (Provider::HyperV, 0x4000_0021)] {
        let board = Board::with(&setup(provider));
        assert!(board.gim.write_msr(&cpu(0), register, 0x5000 | 1));
        match provider {
            Provider::Kvm => assert_eq!(board.bytes::<1>(0x501d), [0]),
            _ => assert_eq!(board.u32_at(0x5000), 0, "the page is not to be used"),
        }
    }
}

#[test]
fn hyperv_calls_need_an_identity_and_the_page() {
    let board = Board::new(Provider::HyperV);
    let mut caller = cpu(0);
    assert!(!board.gim.hypercall(&mut caller), "no page yet");
    assert!(board.gim.write_msr(&caller, 0x4000_0001, 0x6000 | 1));
    assert_eq!(board.gim.read_msr(VcpuId(0), 0x4000_0001), Some(0x6000), "no identity yet");
    assert!(board.gim.write_msr(&caller, 0x4000_0000, 0x8100_0000_0000_0001));
    assert!(board.gim.write_msr(&caller, 0x4000_0001, 0x6000 | 1));
    assert_eq!(board.bytes::<4>(0x6000), [0x0f, 0x01, 0xc1, 0xc3]);
    caller.gpr[gpr::RCX] = 8;
    assert!(board.gim.hypercall(&mut caller));
    assert_eq!(caller.gpr[gpr::RAX], 0);
    caller.gpr[gpr::RCX] = 0x5c;
    assert!(board.gim.hypercall(&mut caller));
    assert_eq!(caller.gpr[gpr::RAX], 2);
    caller.seg[seg::SS].attr.set_dpl(3);
    assert!(!board.gim.hypercall(&mut caller), "user code may not call");
}

#[test]
fn a_locked_hypercall_page_stays() {
    let board = Board::new(Provider::HyperV);
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0000, 1));
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0001, 0x6000 | 3));
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0001, 0x7000 | 1));
    assert_eq!(board.gim.read_msr(VcpuId(0), 0x4000_0001), Some(0x6003));
}

#[test]
fn hyperv_tells_frequencies_and_indexes_and_resets() {
    let board = Board::new(Provider::HyperV);
    assert_eq!(board.gim.read_msr(VcpuId(1), 0x4000_0002), Some(1));
    assert_eq!(board.gim.read_msr(VcpuId(1), 0x4000_0022), Some(TSC.0));
    assert_eq!(board.gim.read_msr(VcpuId(1), 0x4000_0023), Some(1_000_000_000));
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0003, 1));
    assert_eq!(board.resets.0.load(Ordering::SeqCst), 1);
}

#[test]
fn a_crash_is_told_with_its_parameters_which_stay_and_a_guest_that_says_it_again_and_again_is_not_listened_to()
 {
    let board = Board::new(Provider::HyperV);
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0105, 0));
    assert!(board.crashes.lock().is_empty());
    for n in 0..5 {
        assert!(board.gim.write_msr(&cpu(0), 0x4000_0100 + n, u64::from(n) + 10));
    }
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0105, 1 << 63));
    assert_eq!(board.gim.read_msr(VcpuId(0), 0x4000_0104), Some(14));
    assert_eq!(*board.crashes.lock(), [Crash([10, 11, 12, 13, 14])]);
    (0..100).for_each(|_| assert!(board.gim.write_msr(&cpu(0), 0x4000_0105, 1 << 63)));
    assert_eq!(board.crashes.lock().len(), MOST_CRASHES as usize);
    board.gim.device().lock().reset();
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0105, 1 << 63));
    assert_eq!(board.crashes.lock().last(), Some(&Crash([0; 5])));
}

#[test]
fn a_reset_forgets_and_a_saved_state_brings_back() {
    for (provider, number, value) in
        [(Provider::Kvm, 0x4b56_4d01, 0x1001), (Provider::HyperV, 0x4000_0021, 0x5001)]
    {
        let board = Board::new(provider);
        let unit = board.gim.device();
        assert!(board.gim.write_msr(&cpu(1), number, value));
        let mut out = Writer::new();
        unit.lock().save(&mut out);
        let saved = out.into_bytes();
        unit.lock().reset();
        assert_eq!(board.gim.read_msr(VcpuId(1), number), Some(0));
        unit.lock().load(Reader::new("gim", 1, &saved)).unwrap();
        assert_eq!(board.gim.read_msr(VcpuId(1), number), Some(value));
        assert!(unit.lock().load(Reader::new("gim", 1, &saved[1..])).is_err());
    }
}
