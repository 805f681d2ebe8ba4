//! The controllers wired together, driven through their registers.

use pdm::RemoteApics;

use super::*;
use crate::spec::reg;

struct Vm {
    apic: Arc<Apic>,
    links: Vec<Arc<VcpuLink>>,
    timers: Arc<TimerQueue>,
    pgm: Arc<Pgm>,
}

const BSP: VcpuId = VcpuId(0);
const AP: VcpuId = VcpuId(1);

fn vm(cpus: usize) -> Vm {
    let links: Vec<_> = (0..cpus).map(|_| Arc::new(VcpuLink::default())).collect();
    let timers = TimerQueue::new(Clock::manual());
    let config =
        ApicConfig { local_apic: true, x2apic: true, io_apic: true, tsc_frequency: Hz(2_000_000_000) };
    let apic = Apic::new(config, &links, &timers);
    let pgm = Pgm::new(links.clone());
    apic.register(&pgm);
    Vm { apic, links, timers, pgm }
}

impl Vm {
    fn page(&self, address: u64) -> (Arc<dyn MmioHandler>, u64) {
        match self.pgm.resolve(GuestPhys(address)).read {
            pgm::Target::Mmio { handler, offset } => (handler, offset),
            _ => panic!("no registers at 0x{address:x}"),
        }
    }

    fn read(&self, cpu: VcpuId, register: u32) -> u32 {
        let (handler, offset) = self.page(LOCAL_BASE.0 + u64::from(register));
        let mut data = [0; 4];
        handler.mmio_read(cpu, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, cpu: VcpuId, register: u32, value: u32) {
        let (handler, offset) = self.page(LOCAL_BASE.0 + u64::from(register));
        handler.mmio_write(cpu, offset, &value.to_le_bytes());
    }

    fn redirect(&self, pin: u32, entry: u64) {
        let (handler, offset) = self.page(IO_BASE.0);
        for half in [1, 0] {
            handler.mmio_write(BSP, offset, &(0x10 + 2 * pin + half).to_le_bytes());
            handler.mmio_write(BSP, offset + 0x10, &((entry >> (32 * half)) as u32).to_le_bytes());
        }
    }

    fn enable(&self) {
        for cpu in 0..self.links.len() {
            self.write(VcpuId(cpu as u32), reg::SVR, 0x1ff);
        }
    }

    fn advance(&self, by: Nanos) {
        self.timers.clock().advance(by);
        self.timers.fire_due();
    }

    fn wants(&self, cpu: VcpuId) -> bool {
        let flag = self.links[cpu.index()].pending().contains(ForcedActions::INTERRUPT);
        assert_eq!(flag, self.apic.is_pending(cpu), "the request and the controller agree");
        flag
    }
}

struct Pic(IrqLine);
impl ExtInt for Pic {
    fn is_pending(&self) -> bool {
        true
    }
    fn acknowledge(&self) -> u8 {
        self.0.set(false);
        0x38
    }
}

#[test]
fn the_registers_after_reset_are_those_of_the_manual() {
    let vm = vm(2);
    assert_eq!(vm.read(AP, reg::ID), 0x0100_0000);
    assert_eq!(vm.read(AP, reg::VERSION), 0x0005_0014);
    assert_eq!(vm.read(AP, reg::SVR), 0xff);
    assert_eq!(vm.read(AP, reg::DFR), 0xffff_ffff);
    assert_eq!(vm.read(AP, reg::LVT_LINT0), 0x1_0000);
    assert_eq!(vm.read(BSP, reg::LVT_LINT0), 0x700);
    vm.write(BSP, reg::LVT_TIMER, 0x40);
    assert_eq!(vm.read(BSP, reg::LVT_TIMER), 0x1_0040, "a disabled APIC keeps its vectors masked");
}

#[test]
fn an_interrupt_waits_for_a_higher_one_in_service_and_for_the_task_priority() {
    let vm = vm(1);
    vm.enable();
    vm.apic.send(0xfee0_0000, 0x51);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x51));
    assert!(!vm.wants(BSP));
    vm.apic.send(0xfee0_0000, 0x5f);
    assert!(!vm.wants(BSP), "the same priority class waits");
    vm.apic.send(0xfee0_0000, 0x61);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x61));
    assert_eq!(vm.read(BSP, reg::PPR), 0x60);
    vm.write(BSP, reg::EOI, 0);
    vm.apic.write_cr8(BSP, 5);
    vm.write(BSP, reg::EOI, 0);
    assert!(!vm.wants(BSP));
    assert_eq!(vm.apic.acknowledge(BSP), None);
    vm.apic.write_cr8(BSP, 4);
    assert_eq!(vm.read(BSP, reg::TPR), 0x40);
    assert!(vm.wants(BSP));
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x5f));
}

#[test]
fn a_level_interrupt_comes_again_after_eoi_until_the_line_drops() {
    let vm = vm(1);
    vm.enable();
    let inputs = vm.apic.io_apic().unwrap();
    vm.redirect(16, 0x8071);
    inputs.set_level(16, true);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x71));
    assert_eq!(vm.read(BSP, reg::TMR + 0x30), 1 << 17);
    vm.write(BSP, reg::EOI, 0);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x71));
    inputs.set_level(16, false);
    vm.write(BSP, reg::EOI, 0);
    assert!(!vm.wants(BSP));
}

#[test]
fn the_8259_pair_reaches_the_cpu_in_virtual_wire_mode_and_with_the_apic_off() {
    let vm = vm(1);
    let line = vm.apic.intr_line();
    vm.apic.connect_pic(Arc::new(Pic(line.clone())));
    line.set(true);
    assert!(vm.wants(BSP));
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x38));
    assert!(!vm.wants(BSP));
    vm.enable();
    vm.write(BSP, reg::LVT_LINT0, 0x1_0700);
    line.set(true);
    assert!(!vm.wants(BSP));
    vm.write(BSP, reg::LVT_LINT0, 0x700);
    assert!(vm.wants(BSP));
    vm.write(BSP, reg::LVT_LINT0, 0x1_0700);
    assert!(vm.apic.set_apic_base(BSP, 0xfee0_0100));
    assert!(vm.wants(BSP));
}

#[test]
fn lint0_in_fixed_mode_takes_its_own_vector() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::LVT_LINT0, 0x31);
    vm.apic.intr_line().set(true);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x31));
    assert!(!vm.wants(BSP));
}

#[test]
fn the_timer_is_exact_in_all_its_modes() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::DIVIDE, 0b1011);
    vm.write(BSP, reg::LVT_TIMER, 0x40);
    vm.write(BSP, reg::INITIAL_COUNT, 1000);
    vm.advance(400);
    assert_eq!(vm.read(BSP, reg::CURRENT_COUNT), 600);
    vm.advance(599);
    assert!(!vm.wants(BSP));
    vm.advance(1);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x40));
    assert_eq!(vm.read(BSP, reg::CURRENT_COUNT), 0);
    vm.write(BSP, reg::EOI, 0);

    vm.write(BSP, reg::LVT_TIMER, 0x2_0041);
    vm.write(BSP, reg::DIVIDE, 0b0011);
    vm.write(BSP, reg::INITIAL_COUNT, 100_000);
    for _ in 0..3 {
        vm.advance(1_600_000);
        assert_eq!(vm.apic.acknowledge(BSP), Some(0x41));
        vm.write(BSP, reg::EOI, 0);
    }
    vm.advance(1_599_999);
    assert_eq!(vm.read(BSP, reg::CURRENT_COUNT), 1);
    vm.write(BSP, reg::INITIAL_COUNT, 0);
    vm.advance(10_000_000);
    assert!(!vm.wants(BSP));

    let now = vm.timers.clock().now();
    assert!(vm.apic.write_msr(BSP, spec::MSR_TSC_DEADLINE, 1));
    assert_eq!(vm.apic.read_msr(BSP, spec::MSR_TSC_DEADLINE), Some(0), "ignored in other modes");
    vm.write(BSP, reg::LVT_TIMER, 0x4_0042);
    assert!(vm.apic.write_msr(BSP, spec::MSR_TSC_DEADLINE, 2 * (now + 500)));
    vm.advance(499);
    assert!(!vm.wants(BSP));
    vm.advance(1);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x42));
    assert_eq!(vm.apic.read_msr(BSP, spec::MSR_TSC_DEADLINE), Some(0));
}

#[test]
fn a_late_timer_thread_joins_missed_periods_and_keeps_the_phase() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::DIVIDE, 0b1011);
    vm.write(BSP, reg::LVT_TIMER, 0x2_0041);
    vm.write(BSP, reg::INITIAL_COUNT, 1_000_000);
    vm.advance(3_200_000);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x41));
    vm.write(BSP, reg::EOI, 0);
    assert!(!vm.wants(BSP));
    assert_eq!(vm.read(BSP, reg::CURRENT_COUNT), 800_000);
    vm.advance(799_999);
    assert!(!vm.wants(BSP));
    vm.advance(1);
    assert!(vm.wants(BSP));
}

#[test]
fn processors_start_by_init_and_sipi() {
    let vm = vm(3);
    vm.enable();
    for link in &vm.links {
        link.clear(ForcedActions::TLB_FLUSH);
    }
    vm.write(BSP, reg::ICR_LOW, 0x000c_4500);
    for cpu in 1..3 {
        assert_eq!(vm.links[cpu].take(ForcedActions::INIT), ForcedActions::INIT);
    }
    assert!(!vm.links[0].pending().contains(ForcedActions::INIT));
    vm.write(BSP, reg::ICR_HIGH, 2 << 24);
    vm.write(BSP, reg::ICR_LOW, 0x8500);
    assert!(vm.links[2].pending().is_empty(), "de-assert does nothing");
    vm.write(BSP, reg::ICR_LOW, 0x4610);
    assert!(vm.links[1].pending().is_empty());
    assert_eq!(vm.links[2].pending(), ForcedActions::SIPI);
    assert_eq!(vm.links[2].sipi_vector(), 0x10);
}

#[test]
fn an_ipi_goes_to_the_logical_and_shorthand_destinations_it_names() {
    let vm = vm(4);
    vm.enable();
    let got = |vector: u8| -> Vec<u32> {
        (0..4).filter(|&cpu| vm.apic.acknowledge(VcpuId(cpu)) == Some(vector)).collect()
    };
    for cpu in 0..4 {
        vm.write(VcpuId(cpu), reg::LDR, 1 << (24 + cpu));
    }
    vm.write(BSP, reg::ICR_HIGH, 0x0a00_0000);
    vm.write(BSP, reg::ICR_LOW, 0x0830);
    assert_eq!(got(0x30), [1, 3]);
    for cpu in 0..4 {
        vm.write(VcpuId(cpu), reg::EOI, 0);
        vm.write(VcpuId(cpu), reg::DFR, 0x0fff_ffff);
        vm.write(VcpuId(cpu), reg::LDR, [0x11, 0x12, 0x21, 0x22][cpu as usize] << 24);
    }
    vm.write(BSP, reg::ICR_HIGH, 0x2300_0000);
    vm.write(BSP, reg::ICR_LOW, 0x0840);
    assert_eq!(got(0x40), [2, 3]);
    vm.write(AP, reg::ICR_LOW, 0x000c_0050);
    assert_eq!(got(0x50), [0, 2, 3]);
    vm.write(AP, reg::ICR_LOW, 0x0008_0060);
    assert_eq!(got(0x60), [0, 1, 2, 3]);
    vm.write(AP, reg::ICR_LOW, 0x0004_0070);
    assert_eq!(got(0x70), [1]);
    vm.write(BSP, reg::ICR_HIGH, 0xff00_0000);
    vm.write(BSP, reg::ICR_LOW, 0x0080);
    assert_eq!(got(0x80), [0, 1, 2, 3]);
    vm.write(BSP, reg::ICR_HIGH, 0x0300_0000);
    vm.write(BSP, reg::ICR_LOW, 0x0400);
    assert!(vm.links[3].pending().contains(ForcedActions::NMI));
}

#[test]
fn lowest_priority_picks_the_idlest_and_equals_take_turns() {
    let vm = vm(2);
    vm.enable();
    for cpu in [BSP, AP] {
        vm.write(cpu, reg::LDR, 1 << (24 + cpu.0));
    }
    vm.apic.write_cr8(BSP, 3);
    vm.apic.send(0xfee0_3004, 0x150);
    assert_eq!(vm.apic.acknowledge(AP), Some(0x50));
    vm.write(AP, reg::EOI, 0);
    vm.apic.write_cr8(BSP, 0);
    let mut count = [0; 2];
    for _ in 0..8 {
        vm.apic.send(0xfee0_3004, 0x150);
        for cpu in [BSP, AP] {
            if vm.apic.acknowledge(cpu).is_some() {
                count[cpu.index()] += 1;
                vm.write(cpu, reg::EOI, 0);
            }
        }
    }
    assert_eq!(count, [4, 4]);
}

#[test]
fn illegal_vectors_and_registers_are_told_in_the_error_status() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::LVT_ERROR, 0xfe);
    vm.write(BSP, reg::ICR_LOW, 0x0004_0005);
    vm.read(BSP, 0x010);
    assert_eq!(vm.read(BSP, reg::ESR), 0);
    vm.write(BSP, reg::ESR, 0);
    assert_eq!(vm.read(BSP, reg::ESR), 0xa0);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0xfe));
}

#[test]
fn x2apic_mode_is_entered_and_left_as_the_manual_allows() {
    let vm = vm(2);
    let base = 0xfee0_0800;
    assert_eq!(vm.apic.read_msr(AP, 0x802), None);
    assert!(!vm.apic.set_apic_base(AP, 0xfee0_0400));
    assert!(vm.apic.set_apic_base(AP, base | 0x400));
    assert!(!vm.apic.set_apic_base(AP, base));
    assert_eq!(vm.apic.read_msr(AP, 0x802), Some(1));
    assert_eq!(vm.apic.read_msr(AP, 0x80d), Some(2));
    assert_eq!(vm.read(AP, reg::VERSION), 0xffff_ffff);
    assert!(!vm.apic.write_msr(AP, 0x802, 5), "read-only");
    assert!(!vm.apic.write_msr(AP, 0x80b, 1), "EOI takes zero only");
    assert!(!vm.apic.write_msr(AP, 0x80f, 0x1000), "reserved bits fault");
    assert!(vm.apic.write_msr(AP, 0x80f, 0x1ff));
    assert!(vm.apic.write_msr(AP, 0x83f, 0x77));
    assert_eq!(vm.apic.acknowledge(AP), Some(0x77));
    assert!(vm.apic.write_msr(AP, 0x80b, 0));
    vm.write(BSP, reg::SVR, 0x1ff);
    assert!(vm.apic.write_msr(AP, 0x830, 0x51));
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x51));
    assert!(vm.apic.set_apic_base(AP, 0xfee0_0000));
    assert!(!vm.apic.set_apic_base(AP, base | 0x400), "off to x2APIC is not allowed");
    assert!(vm.apic.set_apic_base(AP, base));
    assert_eq!(vm.apic.read_msr(AP, 0x802), None);
}

#[test]
fn the_register_page_follows_the_base_of_its_own_cpu() {
    let vm = vm(2);
    assert!(vm.apic.set_apic_base(AP, 0xfed0_1800));
    assert_eq!(vm.read(AP, reg::VERSION), 0xffff_ffff);
    assert_eq!(vm.read(BSP, reg::VERSION), 0x0005_0014);
    let (page, offset) = vm.page(0xfed0_1030);
    let mut data = [0; 4];
    page.mmio_read(AP, offset, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x0005_0014);
    assert!(vm.apic.set_apic_base(AP, 0xfee0_0800));
    assert!(matches!(vm.pgm.resolve(GuestPhys(0xfed0_1030)).read, pgm::Target::Open));
}

#[test]
fn save_restore_save_gives_the_same_bytes_and_the_same_behaviour() {
    let bytes = |vm: &Vm| -> Vec<Vec<u8>> {
        vm.apic
            .devices()
            .iter()
            .map(|d| {
                let mut out = ssm::Writer::new();
                d.lock().save(&mut out);
                out.into_bytes()
            })
            .collect()
    };
    let old = vm(2);
    old.enable();
    old.redirect(16, 0x8071);
    old.apic.io_apic().unwrap().set_level(16, true);
    old.write(AP, reg::DIVIDE, 0b1011);
    old.write(AP, reg::LVT_TIMER, 0x2_0041);
    old.write(AP, reg::INITIAL_COUNT, 1_000_000);
    old.apic.intr_line().set(true);
    let saved = bytes(&old);
    // Another format needs another version, and golden files of its own beside these.
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() };
    let golden = [include_str!("golden/apic.v1.hex"), include_str!("golden/ioapic.v1.hex")];
    for (bytes, golden) in saved.iter().zip(golden) {
        assert_eq!(hex(bytes), golden.split_whitespace().collect::<String>());
    }

    let new = vm(2);
    for (device, bytes) in new.apic.devices().iter().zip(&saved) {
        let mut device = device.lock();
        let unit = device.unit_name();
        device.load(ssm::Reader::new(unit, 1, bytes)).unwrap();
    }
    assert_eq!(bytes(&new), saved);
    assert_eq!(new.apic.acknowledge(BSP), Some(0x71));
    new.advance(1_000_000);
    assert_eq!(new.apic.acknowledge(AP), Some(0x41));

    for device in new.apic.devices() {
        device.lock().reset();
    }
    assert!(!new.wants(AP));
    let fresh = vm(3);
    let unit = &fresh.apic.devices()[0];
    assert!(unit.lock().load(ssm::Reader::new("apic", 1, &saved[0])).is_err());
}

#[test]
fn any_access_is_harmless() {
    let vm = vm(2);
    let mut seed = 1u64;
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let r = seed >> 20;
        let cpu = VcpuId((r & 1) as u32);
        let base = if r & 2 == 0 { LOCAL_BASE.0 } else { IO_BASE.0 };
        let len = [1, 2, 4, 8][(r >> 2 & 3) as usize];
        let (page, offset) = vm.page(base + (r >> 4 & 0xff0));
        if r & 0x1_0000 == 0 {
            page.mmio_read(cpu, offset, &mut vec![0; len]);
        } else {
            page.mmio_write(cpu, offset, &seed.to_le_bytes()[..len]);
        }
        vm.apic.acknowledge(cpu);
        vm.apic.write_msr(cpu, 0x800 + (r >> 24 & 0xff) as u32, seed);
        if r >> 32 & 7 == 0 {
            vm.advance(r & 0xffff);
        }
    }
}

/// APICs elsewhere that note what they are told.
#[derive(Default)]
struct Elsewhere {
    sent: Mutex<Vec<(u64, u32)>>,
    routes: Mutex<Vec<(u64, u32)>>,
}

impl RemoteApics for Elsewhere {
    fn send(&self, address: u64, data: u32) -> bool {
        self.sent.lock().push((address, data));
        true
    }
    fn set_routes(&self, routes: &[(u64, u32)]) {
        *self.routes.lock() = routes.to_vec();
    }
}

#[test]
fn remote_apics_get_the_io_apics_messages_and_end_them() {
    let vm = vm(2);
    vm.enable();
    let elsewhere = Arc::new(Elsewhere::default());
    vm.apic.lend(elsewhere.clone());
    vm.apic.exported(BSP);
    vm.apic.exported(AP);
    assert_eq!(elsewhere.routes.lock().len(), ioapic::PINS);
    // Level-triggered, logical destination 3, vector 0x51.
    vm.redirect(11, 3 << 56 | 1 << 15 | 1 << 11 | 0x51);
    assert_eq!(elsewhere.routes.lock()[11], (0xfee0_3004, 0xc051));
    let pin = vm.apic.io_apic().unwrap();
    pin.set_level(11, true);
    pin.set_level(11, true);
    assert_eq!(*elsewhere.sent.lock(), [(0xfee0_3004, 0xc051)]);
    assert!(!vm.wants(BSP) && !vm.wants(AP));
    vm.apic.end_of_interrupt(0x51);
    assert_eq!(elsewhere.sent.lock().len(), 2, "the line is still high");
    pin.set_level(11, false);
    vm.apic.end_of_interrupt(0x51);
    assert_eq!(elsewhere.sent.lock().len(), 2);
}

#[test]
fn the_8259_pair_is_asked_here_while_the_apics_are_elsewhere() {
    let vm = vm(1);
    let line = vm.apic.intr_line();
    vm.apic.connect_pic(Arc::new(Pic(line.clone())));
    vm.apic.lend(Arc::new(Elsewhere::default()));
    assert!(!vm.wants(BSP));
    line.set(true);
    assert!(vm.wants(BSP));
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x38));
    assert!(!vm.wants(BSP));
}

#[test]
fn what_comes_before_the_remote_apics_have_started_reaches_them_then() {
    let vm = vm(2);
    vm.enable();
    vm.redirect(11, 1 << 56 | 0x51);
    let elsewhere = Arc::new(Elsewhere::default());
    vm.apic.lend(elsewhere.clone());
    vm.apic.exported(BSP);
    let pin = vm.apic.io_apic().unwrap();
    pin.set_level(11, true);
    assert!(elsewhere.sent.lock().is_empty());
    vm.apic.exported(AP);
    assert_eq!(*elsewhere.sent.lock(), [(0xfee0_1000, 0x51)]);
}

#[test]
fn apics_that_are_taken_back_serve_their_requests_and_timers_here_again() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::LVT_TIMER, 0x4_0041);
    let elsewhere = Arc::new(Elsewhere::default());
    vm.apic.lend(elsewhere.clone());
    let (mut registers, _) = vm.apic.export(BSP);
    vm.apic.exported(BSP);
    registers.deadline = 5_000_000;
    vm.apic.import(BSP, &registers);
    vm.apic.take_back();
    assert!(!vm.wants(BSP));
    vm.apic.accept(BSP, 0x71, false);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x71));
    vm.write(BSP, reg::EOI, 0);
    vm.advance(5_000_000);
    assert_eq!(vm.apic.acknowledge(BSP), Some(0x41), "the timer runs here");
    assert!(elsewhere.sent.lock().is_empty());
}

#[test]
fn registers_go_elsewhere_and_come_back() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::TPR, 0x20);
    vm.write(BSP, reg::LDR, 0x0100_0000);
    vm.write(BSP, reg::DIVIDE, 0xb);
    vm.write(BSP, reg::LVT_TIMER, 0x2_0041);
    vm.write(BSP, reg::INITIAL_COUNT, 1_000_000);
    vm.advance(250_000);
    vm.apic.locals[0].state.lock().accept(0x71, true);
    let (exported, replaced) = vm.apic.export(BSP);
    assert!(replaced, "nothing was exported before");
    vm.apic.exported(BSP);
    assert!(!vm.apic.export(BSP).1);
    let before = vm.apic.locals[0].state.lock().clone();
    vm.apic.import(BSP, &exported);
    assert_eq!(*vm.apic.locals[0].state.lock(), before);
    vm.apic.reset_locals();
    assert!(vm.apic.export(BSP).1);
    assert_ne!(*vm.apic.locals[0].state.lock(), before);
    vm.apic.import(BSP, &exported);
    assert_eq!(*vm.apic.locals[0].state.lock(), before);
}

#[test]
fn a_deadline_goes_elsewhere_in_ticks() {
    let vm = vm(1);
    vm.enable();
    vm.write(BSP, reg::LVT_TIMER, 0x4_0041);
    assert!(vm.apic.write_msr(BSP, spec::MSR_TSC_DEADLINE, 5_000_000));
    let (exported, _) = vm.apic.export(BSP);
    assert_eq!(exported.deadline, 5_000_000);
    let before = vm.apic.locals[0].state.lock().clone();
    vm.apic.import(BSP, &exported);
    assert_eq!(*vm.apic.locals[0].state.lock(), before);
}
