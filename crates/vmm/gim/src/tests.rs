use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64};

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
    wire: Arc<Wire>,
}

/// A debugger's end of the connection.
#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<Vec<u8>>>,
    coming: Mutex<VecDeque<Vec<u8>>>,
    is_down: AtomicBool,
}

impl Debugger for Wire {
    fn send(&self, payload: &[u8]) -> bool {
        if self.is_down.load(Ordering::SeqCst) {
            return false;
        }
        self.sent.lock().push(payload.to_vec());
        true
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.coming.lock().pop_front()
    }

    fn has_data(&self) -> bool {
        !self.coming.lock().is_empty()
    }
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
        let wire = Arc::new(Wire::default());
        let wiring = Wiring {
            pgm: pgm.clone(),
            clock: clock.clone(),
            links: links.clone(),
            utc: Box::new(|| UTC),
            control: resets.clone(),
            amd: false,
            crashed: Box::new(move |crash| met.lock().push(*crash)),
            stolen: Some(Box::new(move || told.load(Ordering::SeqCst))),
            debugger: Some(wire.clone()),
        };
        let gim = Gim::new(setup, wiring).unwrap();
        Self { gim, pgm, clock, links, resets, waited, crashes, wire }
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
        debug: None,
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

/// A machine whose guest finds a debugger.
fn debugged(service: bool) -> Board {
    Board::with(&Setup { debug: Some(DebugInterface { service, calls: true }), ..setup(Provider::HyperV) })
}

const SEND_AT: u64 = 0x8000;
const RECEIVE_AT: u64 = 0x9000;
const PENDING_AT: u64 = 0xa000;

impl Board {
    fn write(&self, at: u64, data: &[u8]) {
        self.pgm.write(GuestPhys(at), data);
    }

    fn vec(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut out);
        out
    }

    /// The debugger sends a datagram.
    fn debugger_sends(&self, data: &[u8]) {
        self.wire.coming.lock().push_back(data.to_vec());
        self.gim.debugger_spoke();
    }

    /// Makes a call with its parameters in memory.
    fn call(&self, code: u64, input: u64, output: u64) -> u64 {
        let mut caller = cpu(0);
        assert!(self.gim.write_msr(&caller, 0x4000_0000, 1));
        assert!(self.gim.write_msr(&caller, 0x4000_0001, 0x6000 | 1));
        (caller.gpr[gpr::RCX], caller.gpr[gpr::RDX], caller.gpr[gpr::R8]) = (code, input, output);
        assert!(self.gim.hypercall(&mut caller));
        caller.gpr[gpr::RAX]
    }

    /// HvPostDebugData of a frame.
    fn post(&self, frame: &[u8]) -> u64 {
        self.write(SEND_AT, &(frame.len() as u64).to_le_bytes());
        self.write(SEND_AT + 8, frame);
        self.call(0x69, SEND_AT, RECEIVE_AT)
    }

    /// HvRetrieveDebugData with so much room: the result and what came.
    fn retrieve(&self, room: u32) -> (u64, Vec<u8>) {
        self.write(SEND_AT, &u64::from(room).to_le_bytes());
        let result = self.call(0x6a, SEND_AT, RECEIVE_AT);
        let (got, left) = (self.u32_at(RECEIVE_AT), self.u32_at(RECEIVE_AT + 4));
        assert_eq!(got + left, room);
        (result, self.vec(RECEIVE_AT + 8, got as usize))
    }
}

/// A frame as Windows sends them: no addresses on the wire, UDP over IPv4.
fn udp_frame(from: [u8; 4], to: [u8; 4], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend((28 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend(from);
    frame.extend(to);
    frame.extend(ports.map(u16::to_be_bytes).concat());
    frame.extend((8 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// A DHCP message of a client: 1 is DISCOVER, 3 is REQUEST.
fn dhcp_frame(kind: u8) -> Vec<u8> {
    let mut message = vec![0; 240];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[4..8].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    message[236..].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    message.extend([53, 1, kind, 255]);
    udp_frame([0; 4], [255; 4], [68, 67], &message)
}

#[test]
fn a_debugger_shows_only_where_one_is_configured() {
    let leaves = |debug| match (Setup { debug, ..setup(Provider::HyperV) }).cpuid() {
        Paravirt::Shown(list) => list,
        Paravirt::None => Vec::new(),
    };
    let of = |list: &[Entry], number| list.iter().find(|e| e.leaf == number).map(|e| e.value);
    let (none, calls) = (leaves(None), leaves(Some(DebugInterface { service: false, calls: true })));
    let features = |list: &[Entry]| of(list, 0x4000_0003).unwrap();
    assert_eq!((features(&none).ebx, features(&calls).ebx), (0, 0x800));
    assert_eq!(features(&none).edx ^ features(&calls).edx, 0x802);
    assert_eq!(of(&calls, 0x4000_0080), None);
    let service = leaves(Some(DebugInterface { service: true, calls: false }));
    assert_eq!(of(&service, 0x4000_0000).unwrap().eax, 0x4000_0082);
    assert_eq!(of(&service, 0x4000_0081).unwrap().eax, 0x3123_5356);
    assert_eq!(of(&service, 0x4000_0082).unwrap().eax, 2);

    let plain = Board::new(Provider::HyperV);
    for number in [0x4000_0080, 0x4000_0083, 0x4000_00f2, 0x4000_00ff] {
        assert_eq!(plain.gim.read_msr(VcpuId(0), number), None);
        assert!(debugged(true).gim.read_msr(VcpuId(0), number).is_some(), "{number:x}");
    }
    assert_eq!(plain.post(b"data"), 2, "no such call");
    assert_eq!(debugged(true).gim.read_msr(VcpuId(0), 0x4000_00ff), Some(4));
    assert_eq!(debugged(false).gim.read_msr(VcpuId(0), 0x4000_0083), None);
}

#[test]
fn data_goes_by_registers_as_it_is() {
    let board = debugged(true);
    let write = |number, value| board.gim.write_msr(&cpu(0), number, value);
    let status = || board.gim.read_msr(VcpuId(1), 0x4000_00f2).unwrap();
    assert!(write(0x4000_00f3, SEND_AT) && write(0x4000_00f4, RECEIVE_AT) && write(0x4000_00f5, PENDING_AT));
    board.write(SEND_AT, b"KDBG!");
    assert!(write(0x4000_00f1, 5 << 16 | 1));
    assert_eq!((status(), board.wire.sent.lock().pop()), (1, Some(b"KDBG!".to_vec())));

    assert!(write(0x4000_00f1, 2));
    assert_eq!(status(), 0, "nothing has come");
    board.debugger_sends(b"first");
    board.debugger_sends(&[7; 5000]);
    assert_eq!(board.bytes::<1>(PENDING_AT), [1]);
    assert!(write(0x4000_00f1, 2));
    assert_eq!((status(), board.vec(RECEIVE_AT, 5)), (5 << 16 | 4, b"first".to_vec()));
    assert_eq!(board.bytes::<1>(PENDING_AT), [1], "there is more");
    assert!(write(0x4000_00f1, 2));
    assert_eq!(
        (status(), board.bytes::<1>(RECEIVE_AT + 0x1000 + 1)),
        (0x1000 << 16 | 4, [0]),
        "one page at most"
    );
    assert_eq!(board.bytes::<1>(PENDING_AT), [0]);

    board.wire.is_down.store(true, Ordering::SeqCst);
    assert!(write(0x4000_00f1, 5 << 16 | 1));
    assert_eq!(status(), 0);
    assert!(!write(0x4000_00f1, 5 << 16 | 3), "both at once");
    // Sizes and addresses of which nothing can come.
    for (buffer, size) in [(SEND_AT, 0u64), (SEND_AT, 0x1001), (RAM, 5), (u64::MAX - 2, 5)] {
        board.wire.is_down.store(false, Ordering::SeqCst);
        assert!(write(0x4000_00f3, buffer) && write(0x4000_00f1, size << 16 | 1));
        assert_eq!((status(), board.wire.sent.lock().len()), (0, 0), "{buffer:x} {size}");
    }
    board.debugger_sends(b"kept");
    assert!(write(0x4000_00f4, RAM) && write(0x4000_00f1, 2));
    assert_eq!((status(), board.wire.coming.lock().len()), (0, 1));
}

#[test]
fn a_guest_that_sends_frames_gets_an_address_and_a_neighbour_and_then_the_debuggers_datagrams() {
    let board = debugged(false);
    assert_eq!(board.retrieve(4088), (0x1b, Vec::new()));
    for (asked, given) in [(1, 2), (3, 5)] {
        assert_eq!(board.post(&dhcp_frame(asked)), 0);
        let (result, reply) = board.retrieve(4088);
        assert_eq!((result, &reply[12..14], &reply[26..30]), (0, &[8, 0][..], &[10, 0, 5, 1][..]));
        assert_eq!(reply[34..38], [0, 67, 0, 68]);
        let message = &reply[42..];
        assert_eq!(
            (message[0], &message[4..8], &message[16..20]),
            (2, &[0xde, 0xad, 0xbe, 0xef][..], &[10, 0, 5, 5][..])
        );
        assert_eq!(message[240..243], [53, 1, given]);
        assert_eq!(board.retrieve(4088).0, 0x1b, "once");
    }
    let mut arp = vec![0; 12];
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 5, 5, 0, 0, 0, 0, 0, 0, 10, 0, 5, 1]);
    assert_eq!(board.post(&arp), 0);
    let (_, reply) = board.retrieve(4088);
    assert_eq!((reply[21], &reply[22..32]), (2, &[0, 0, 0, 0, 0, 1, 10, 0, 5, 1][..]));
    assert!(board.wire.sent.lock().is_empty(), "nothing of that is the debugger's");

    board.debugger_sends(b"too early");
    assert_eq!(board.retrieve(4088).0, 0x1b, "the guest has not called yet");
    assert_eq!(board.post(&udp_frame([10, 0, 5, 5], [1, 2, 3, 4], [0, 0], b"kd")), 0);
    assert_eq!(board.wire.sent.lock().pop(), Some(b"kd".to_vec()));
    let (result, frame) = board.retrieve(4088);
    assert_eq!((result, &frame[30..34], &frame[42..]), (0, &[10, 0, 5, 5][..], &b"too early"[..]));
    let header: u32 = frame[14..34].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    assert_eq!((header & 0xffff) + (header >> 16), 0xffff, "the checksum holds");

    // Windows 8.1's leftovers: ports of DHCP, but no message of it, and no destination.
    let frame = udp_frame([10, 0, 5, 5], [0; 4], [68, 67], b"leftover");
    assert_eq!((board.post(&frame), board.wire.sent.lock().pop()), (0, Some(b"leftover".to_vec())));
    board.debugger_sends(b"reply");
    assert_eq!(board.retrieve(4088).1[34..38], [0, 67, 0, 68], "where it came from");
}

#[test]
fn frames_of_others_and_broken_ones_go_nowhere() {
    let board = debugged(false);
    let good = udp_frame([10, 0, 5, 5], [1, 2, 3, 4], [0, 0], b"kd");
    for length in 0..good.len() {
        assert_eq!(board.post(&good[..length]), 0);
    }
    assert_eq!(board.post(&udp_frame([10, 0, 5, 5], [1, 2, 3, 4], [1000, 53], b"name?")), 0);
    let mut tcp = good.clone();
    tcp[23] = 6;
    assert_eq!(board.post(&tcp), 0);
    assert!(board.wire.sent.lock().is_empty());
    assert_eq!(board.retrieve(4088).0, 0x1b);
    // Where the host takes nothing the guest is to come again.
    board.wire.is_down.store(true, Ordering::SeqCst);
    assert_eq!((board.post(&good), board.u32_at(RECEIVE_AT)), (0x33, good.len() as u32));
}

#[test]
fn calls_of_the_debuggers_with_wrong_parameters_get_their_errors() {
    let board = debugged(true);
    assert_eq!(board.call(0x69, SEND_AT + 4, RECEIVE_AT), 4);
    assert_eq!(board.call(0x6a, SEND_AT, RECEIVE_AT + 1), 4);
    assert_eq!(board.call(0x69, RAM, RECEIVE_AT), 5);
    assert_eq!(board.call(0x6a, SEND_AT, RAM), 5);
    board.write(SEND_AT, &4089u64.to_le_bytes());
    assert_eq!(board.call(0x69, SEND_AT, RECEIVE_AT), 5);
    assert_eq!(board.call(0x6a, SEND_AT, RECEIVE_AT), 5);
    assert_eq!((board.call(0x6b, SEND_AT, 0), board.call(0x6b | 1 << 16, 0, 0)), (0, 5));
    // What the guest has no room for is lost.
    assert_eq!(board.post(&udp_frame([10, 0, 5, 5], [1, 2, 3, 4], [0, 0], b"kd")), 0);
    board.debugger_sends(&[1; 100]);
    assert_eq!(board.retrieve(60), (0x1b, Vec::new()));
    assert_eq!(board.retrieve(0), (0, Vec::new()));
    assert!(!board.wire.has_data());
}

#[test]
fn vmbus_is_refused_in_a_way_that_has_guests_go_on() {
    let board = debugged(true);
    let write = |number, value| assert!(board.gim.write_msr(&cpu(0), number, value));
    board.write(SEND_AT, &[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0]);
    assert_eq!(board.call(0x5c, SEND_AT, 0), 0x14);
    assert_eq!(board.bytes::<1>(0xb200), [0], "its source is masked");
    write(0x4000_0083, 0xb001);
    write(0x4000_0092, 0x30);
    assert_eq!(board.call(0x5c, SEND_AT, 0), 0x14);
    assert_eq!((board.u32_at(0xb200), board.u32_at(0xb204), board.u32_at(0xb210)), (1, 15, 15));
    assert_eq!(board.gim.read_msr(VcpuId(1), 0x4000_0092), Some(1 << 16), "each vCPU has its own");
}

#[test]
fn a_debugged_guest_is_saved_and_goes_on_only_where_a_debugger_is_configured() {
    let board = debugged(true);
    assert!(board.gim.write_msr(&cpu(0), 0x4000_00f3, SEND_AT));
    assert!(board.gim.write_msr(&cpu(0), 0x4000_0083, 0xb001));
    assert_eq!(board.post(&udp_frame([10, 0, 5, 9], [1, 2, 3, 4], [0, 0], b"kd")), 0);
    let mut out = Writer::new();
    board.gim.device().lock().save(&mut out);
    let saved = out.into_bytes();
    board.gim.device().lock().reset();
    assert_eq!(board.gim.read_msr(VcpuId(0), 0x4000_00f3), Some(0));
    let other = debugged(true);
    other.gim.device().lock().load(Reader::new("gim", VERSION, &saved)).unwrap();
    assert_eq!(other.gim.read_msr(VcpuId(0), 0x4000_00f3), Some(SEND_AT));
    assert_eq!(other.gim.read_msr(VcpuId(0), 0x4000_0083), Some(0xb001));
    other.debugger_sends(b"on");
    assert_eq!(other.retrieve(4088).1[30..34], [10, 0, 5, 9]);
    let plain = Board::new(Provider::HyperV).gim.device();
    let error = plain.lock().load(Reader::new("gim", VERSION, &saved)).unwrap_err().to_string();
    assert!(error.contains("--paravirt-debug"), "{error}");
}
