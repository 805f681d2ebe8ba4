//! A machine without devices for one vCPU and any engine.

use std::sync::Arc;

use cpum::cpuid::{Apic, Config, FeatureBit, Paravirt};
use cpum::{CpuidTable, VcpuLink};
use em::{Engine, VmContext};
use iem::testing::NoInterrupts;
use parking_lot::Mutex;
use pdm::{Iom, PortIo, Width};
use pgm::{Backing, HostMemory, Layer, MmioHandler, PAGE_SIZE, Pgm};
use vbox_types::{ByteSize, GuestPhys, Hz, Port, VcpuId};

/// The engines there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Interpreter,
    Recompiler,
    /// Where the host has it.
    Kvm,
}

impl Kind {
    /// Those that run everywhere.
    pub const ALL: &[Self] = &[Self::Interpreter, Self::Recompiler];

    /// The engine of a name as command lines give it.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "iem" | "interpreter" => Some(Self::Interpreter),
            "rem" | "recompiler" => Some(Self::Recompiler),
            "nem" | "kvm" => Some(Self::Kvm),
            _ => None,
        }
    }

    /// The software engines' features that this one lacks on this host: boards that compare it have to hide them.
    ///
    /// # Panics
    /// If the engine cannot run here.
    pub fn lacks(self) -> Vec<FeatureBit> {
        if self != Self::Kvm {
            return Vec::new();
        }
        let all = iem::cpuid_features();
        let has = nem_kvm::Host::probe().expect("a usable KVM").features(&all);
        all.into_iter().filter(|f| !has.contains(f)).collect()
    }

    /// An engine for vCPU `id`.
    pub fn engine(self, ctx: &Arc<VmContext>, id: VcpuId) -> std::io::Result<Box<dyn Engine>> {
        match self {
            Self::Interpreter => Ok(Box::new(iem::Iem::new(ctx.clone(), id)?)),
            Self::Recompiler => Ok(Box::new(rem::Rem::new(ctx.clone(), id)?)),
            Self::Kvm => {
                let host = nem_kvm::Host::probe().map_err(std::io::Error::other)?;
                let mut engines = host.engines(ctx)?;
                if id.index() < engines.len() {
                    Ok(engines.swap_remove(id.index()))
                } else {
                    Err(std::io::Error::other("the board has no such vCPU"))
                }
            }
        }
    }
}

/// Port that takes what handlers have to say, and the test port whose accesses are recorded.
pub const LOG_PORT: u16 = 0xe0;
pub const TEST_PORT: u16 = 0xe8;

/// What reached the ports and the device's registers.
#[derive(Default)]
pub struct Recorder {
    /// Words written to the log port.
    pub log: Vec<u32>,
    /// Accesses to the test port and to the registers: kind and width, place, value.
    pub accesses: Vec<(u8, u64, u64)>,
    /// Goes into what reads give, so that a read done twice shows.
    count: u64,
}

impl Recorder {
    /// Accesses that are recorded, so that a guest gone astray does not fill the host's memory.
    const MOST: usize = 1 << 20;

    fn note(&mut self, kind: u8, place: u64, value: u64) {
        if self.accesses.len() < Self::MOST {
            self.accesses.push((kind, place, value));
        }
    }

    /// A read of a register in memory.
    pub fn mmio_read(&mut self, place: u64, data: &mut [u8]) {
        let value = self.answer(place).to_le_bytes();
        let len = data.len().min(8);
        data[..len].copy_from_slice(&value[..len]);
        self.note(0x20 | len as u8, place, u64::from_le_bytes(value));
    }

    /// A write to a register in memory.
    pub fn mmio_write(&mut self, place: u64, data: &[u8]) {
        let mut value = [0; 8];
        let len = data.len().min(8);
        value[..len].copy_from_slice(&data[..len]);
        self.note(0x30 | len as u8, place, u64::from_le_bytes(value));
    }

    fn answer(&mut self, place: u64) -> u64 {
        self.count = self.count.wrapping_add(1);
        (place ^ self.count << 3).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.log.clear();
        self.accesses.clear();
        self.count = 0;
    }
}

impl PortIo for Recorder {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        if port.0 == LOG_PORT {
            return 0;
        }
        let value = self.answer(port.0.into()) as u32 & width.ones();
        self.note(width as u8, port.0.into(), value.into());
        value
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        if port.0 == LOG_PORT {
            self.log.push(value);
        } else {
            self.note(0x10 | width as u8, port.0.into(), value.into());
        }
    }
}

/// The recorder's registers in memory.
struct Registers(Arc<Mutex<Recorder>>);

impl MmioHandler for Registers {
    fn mmio_read(&self, _: VcpuId, offset: u64, data: &mut [u8]) {
        self.0.lock().mmio_read(offset, data);
    }

    fn mmio_write(&self, _: VcpuId, offset: u64, data: &[u8]) {
        self.0.lock().mmio_write(offset, data);
    }
}

/// RAM and a context for one or more vCPUs.
pub struct Board {
    pub ctx: Arc<VmContext>,
    pub ram: Arc<HostMemory>,
    pub recorder: Arc<Mutex<Recorder>>,
}

/// Rate of the boards' time-stamp counters.
pub const TSC: Hz = Hz(1_000_000_000);

impl Board {
    /// `ram` bytes of memory at physical address `at`; CPUID without the `hidden` features.
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn new(vcpus: usize, at: u64, ram: u64, hidden: &[FeatureBit]) -> Self {
        let links: Vec<_> = (0..vcpus).map(|_| Arc::new(VcpuLink::default())).collect();
        let pgm = Pgm::new(links.clone());
        let memory = Arc::new(HostMemory::new("test-ram", ByteSize(ram)).expect("guest memory"));
        pgm.map(GuestPhys(at), ram, Layer::Ram, Backing::ram(memory.clone(), 0));
        let iom = Iom::new();
        let recorder = Arc::new(Mutex::new(Recorder::default()));
        iom.register(Port(LOG_PORT), 16, Width::Dword, recorder.clone());
        let config = Config {
            vcpus: vcpus as u32,
            tsc_frequency: TSC,
            apic_frequency: TSC,
            apic: Apic::X2Apic,
            pae: true,
            long_mode: true,
            paravirt: Paravirt::None,
            features: iem::cpuid_features().into_iter().filter(|f| !hidden.contains(f)).collect(),
            overrides: Vec::new(),
        };
        let ctx = Arc::new(VmContext {
            pgm,
            iom,
            irq: Arc::new(NoInterrupts::default()),
            clock: tm::Clock::manual(),
            tsc_frequency: TSC,
            links,
            cpuid: CpuidTable::build(&config, &iem::host_cpuid),
            gim: None,
        });
        Self { ctx, ram: memory, recorder }
    }

    /// Puts the recorder's registers over a page.
    pub fn map_registers(&self, at: u64) {
        let handler = Arc::new(Registers(self.recorder.clone()));
        self.ctx.pgm.map(GuestPhys(at), PAGE_SIZE, Layer::PciBar, Backing::mmio(handler));
    }

    /// Lets writes to a page of RAM, `offset` bytes into it, get lost.
    pub fn map_read_only(&self, at: u64, offset: u64) {
        self.ctx.pgm.map(GuestPhys(at), PAGE_SIZE, Layer::Rom, Backing::rom(self.ram.clone(), offset));
    }

    /// Writes into RAM as a device would, `offset` bytes into it.
    ///
    /// # Panics
    /// If that is outside.
    pub fn put(&self, offset: u64, bytes: &[u8]) {
        assert!(self.ram.write(offset, bytes), "0x{offset:x}");
    }

    /// Has engines that keep what they have decoded decode all of it anew.
    pub fn forget_code(&self) {
        for page in 0..self.ram.len() / PAGE_SIZE {
            if self.ram.code_page(page).is_some_and(pgm::CodePage::has_code) {
                self.ram.forget_code(page);
            }
        }
    }

    /// Reads RAM.
    ///
    /// # Panics
    /// If that is outside.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.ram.read(offset, &mut out), "0x{offset:x}");
        out
    }
}
