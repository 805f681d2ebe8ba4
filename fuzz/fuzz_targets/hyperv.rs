//! The Hyper-V provider with a kernel debugger: whatever a guest writes to its registers, calls, and sends as frames, and whatever the
//! debugger answers, no panic; its state saves and loads to itself.
#![no_main]

use std::collections::VecDeque;
use std::sync::Arc;

use cpum::state::{cr0, efer, gpr, seg};
use cpum::{CpuState, VcpuLink};
use em::Gim as _;
use fuzz::Input;
use gim::debug::{DebugInterface, Debugger};
use gim::{Gim, KvmFeatures, Provider, Setup, Wiring};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::connector::{SystemControl, SystemRequest};
use pgm::{Backing, HostMemory, Layer, Pgm};
use ssm::{Reader, Writer};
use tm::Clock;
use vbox_types::{ByteSize, GuestPhys, Hz, VcpuId};

const RAM: u64 = 1 << 20;
/// The call page, and what calls take and give.
const PAGE: u64 = 0x1000;
const IN: u64 = 0x2000;
const OUT: u64 = 0x4000;

struct Nobody;
impl SystemControl for Nobody {
    fn request(&self, _: SystemRequest) {}
}

#[derive(Default)]
struct Wire(Mutex<VecDeque<Vec<u8>>>);
impl Debugger for Wire {
    fn send(&self, payload: &[u8]) -> bool {
        payload.first() != Some(&0xee)
    }
    fn receive(&self) -> Option<Vec<u8>> {
        self.0.lock().pop_front()
    }
    fn has_data(&self) -> bool {
        !self.0.lock().is_empty()
    }
}

fn provider(pgm: &Arc<Pgm>, wire: &Arc<Wire>, service: bool) -> Arc<Gim> {
    let setup = Setup {
        provider: Provider::HyperV,
        vcpus: 2,
        tsc_frequency: Hz(2_000_000_000),
        apic_frequency: Hz(1_000_000_000),
        x2apic: false,
        hypercalls: true,
        kvm: KvmFeatures::default(),
        stable_counter: true,
        hyperv_vendor: gim::hyperv_vendor(),
        debug: Some(DebugInterface { service, calls: true }),
    };
    let wiring = Wiring {
        pgm: pgm.clone(),
        clock: Clock::manual(),
        links: (0..2).map(|_| Arc::new(VcpuLink::default())).collect(),
        utc: Box::new(|| 0),
        control: Arc::new(Nobody),
        amd: false,
        crashed: Box::new(|_| {}),
        stolen: None,
        debugger: Some(wire.clone()),
    };
    Gim::new(&setup, wiring).expect("the provider has registers")
}

fn save(gim: &Arc<Gim>) -> Vec<u8> {
    let mut out = Writer::new();
    gim.device().lock().save(&mut out);
    out.into_bytes()
}

fuzz_target!(|bytes: &[u8]| {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    let wire = Arc::new(Wire::default());
    let mut input = Input(bytes);
    let service = input.byte() & 1 != 0;
    let gim = provider(&pgm, &wire, service);
    let mut cpu = CpuState::reset(0);
    cpu.cr0 |= cr0::PE | cr0::PG;
    cpu.msr.efer = efer::LME | efer::LMA;
    cpu.seg[seg::CS].attr.set_long(true);
    assert!(gim.write_msr(&cpu, 0x4000_0000, 1));
    assert!(gim.write_msr(&cpu, 0x4000_0001, PAGE | 1));
    while !input.is_empty() {
        match input.byte() % 8 {
            // A frame to the debugger, its addresses and lengths mostly sensible.
            0 | 1 => {
                let kind = input.byte();
                let len = usize::from(input.word() % 400);
                let given = input.bytes(len);
                let mut frame = vec![0; 12];
                let len = given.len() as u16;
                match kind % 4 {
                    0 => frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]),
                    1 | 2 => {
                        frame.extend([8, 0, 0x45, 0]);
                        frame.extend((28 + len).to_be_bytes());
                        frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 5, 5, 0, 0, 0, 0]);
                        frame.extend(if kind % 4 == 1 { [0, 68, 0, 67] } else { [0; 4] });
                        frame.extend((8 + len).to_be_bytes());
                        frame.extend([0, 0]);
                    }
                    _ => {}
                }
                frame.extend(given);
                let size = if kind & 0x80 == 0 { frame.len() as u32 } else { u32::from(input.word()) };
                pgm.write(GuestPhys(IN), &u64::from(size).to_le_bytes());
                pgm.write(GuestPhys(IN + 8), &frame);
                (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX], cpu.gpr[gpr::R8]) = (0x69, IN, OUT);
                assert!(gim.hypercall(&mut cpu));
            }
            2 => {
                pgm.write(GuestPhys(IN), &u32::from(input.word()).to_le_bytes());
                pgm.write(GuestPhys(IN + 4), &u32::from(input.byte()).to_le_bytes());
                (cpu.gpr[gpr::RCX], cpu.gpr[gpr::RDX], cpu.gpr[gpr::R8]) = (0x6a, IN, OUT);
                assert!(gim.hypercall(&mut cpu));
            }
            // Any call, its parameters anywhere.
            3 => {
                let code =
                    [8, 0x5c, 0x69, 0x6a, 0x6b, u64::from(input.word())][usize::from(input.byte() % 6)];
                cpu.gpr[gpr::RCX] = code | u64::from(input.byte()) << 16;
                cpu.gpr[gpr::RDX] = u64::from(input.word()) << (input.byte() % 52);
                cpu.gpr[gpr::R8] = u64::from(input.word()) << (input.byte() % 52);
                cpu.seg[seg::CS].attr.set_long(input.byte() & 7 != 0);
                gim.hypercall(&mut cpu);
                cpu.seg[seg::CS].attr.set_long(true);
            }
            4 | 5 => {
                let register = 0x4000_0000 | u32::from(input.byte()) | u32::from(input.byte() & 1) << 8;
                let value = u64::from(input.word()) << (input.byte() % 52) | u64::from(input.byte() & 7);
                // The page of the calls stays.
                if register > 0x4000_0001 {
                    cpu.id = u32::from(input.byte() & 1);
                    gim.write_msr(&cpu, register, value);
                    gim.read_msr(VcpuId(cpu.id), register);
                }
            }
            6 => {
                let len = usize::from(input.word() % 5000);
                wire.0.lock().push_back(input.bytes(len).to_vec());
                gim.debugger_spoke();
            }
            _ => {
                let first = save(&gim);
                let fresh = provider(&pgm, &wire, service);
                let unit = fresh.device();
                let mut unit = unit.lock();
                let reader = Reader::new("gim-hyperv", unit.unit_version(), &first);
                unit.load(reader).expect("a saved state loads");
                drop(unit);
                assert!(save(&fresh) == first, "save, restore, save differ");
            }
        }
    }
});
