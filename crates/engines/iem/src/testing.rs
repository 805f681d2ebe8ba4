//! A tiny machine for tests: RAM, one or more vCPUs, no devices but those a test registers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cpum::cpuid::{Apic, Config, Paravirt};
use cpum::state::{cr0, cr4, efer, seg};
use cpum::{CpuState, CpuidTable, Descriptor, Segment, VcpuLink};
use em::{Engine, Exit, VmContext};
use pdm::{InterruptController, Iom};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys, Hz, VcpuId};

use crate::engine::Iem;

/// An interrupt controller with nothing behind it but CR8 and the deadline MSR's value.
#[derive(Default)]
pub struct NoInterrupts {
    cr8: AtomicU64,
    deadline: AtomicU64,
}

const TSC_DEADLINE: u32 = 0x6e0;

impl InterruptController for NoInterrupts {
    fn is_pending(&self, _: VcpuId) -> bool {
        false
    }
    fn acknowledge(&self, _: VcpuId) -> Option<u8> {
        None
    }
    fn read_cr8(&self, _: VcpuId) -> u64 {
        self.cr8.load(Ordering::Relaxed)
    }
    fn write_cr8(&self, _: VcpuId, value: u64) {
        self.cr8.store(value, Ordering::Relaxed);
    }
    fn set_apic_base(&self, _: VcpuId, _: u64) -> bool {
        true
    }
    fn read_msr(&self, _: VcpuId, msr: u32) -> Option<u64> {
        (msr == TSC_DEADLINE).then(|| self.deadline.load(Ordering::Relaxed))
    }
    fn write_msr(&self, _: VcpuId, msr: u32, value: u64) -> bool {
        if msr == TSC_DEADLINE {
            self.deadline.store(value, Ordering::Relaxed);
        }
        msr == TSC_DEADLINE
    }
    fn init_reset(&self, _: VcpuId) {}
    fn local_apics(&self) -> Option<&dyn pdm::LocalApics> {
        None
    }
}

/// RAM at zero and a context for any number of vCPUs.
pub struct Board {
    pub ctx: Arc<VmContext>,
    pub pgm: Arc<Pgm>,
    pub iom: Arc<Iom>,
    pub ram: Arc<HostMemory>,
}

impl Board {
    /// `ram` bytes of memory from address zero on.
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn new(vcpus: usize, ram: u64) -> Self {
        let links: Vec<_> = (0..vcpus).map(|_| Arc::new(VcpuLink::default())).collect();
        let pgm = Pgm::new(links.clone());
        let memory = Arc::new(HostMemory::new("test-ram", ByteSize(ram)).expect("guest memory"));
        pgm.map(GuestPhys(0), ram, Layer::Ram, Backing::ram(memory.clone(), 0));
        let iom = Iom::new();
        let frequency = Hz(1_000_000_000);
        let config = Config {
            vcpus: vcpus as u32,
            tsc_frequency: frequency,
            apic_frequency: frequency,
            apic: Apic::X2Apic,
            pae: true,
            long_mode: true,
            paravirt: Paravirt::None,
            features: crate::cpuid_features(),
            overrides: Vec::new(),
        };
        let ctx = Arc::new(VmContext {
            pgm: pgm.clone(),
            iom: iom.clone(),
            irq: Arc::new(NoInterrupts::default()),
            clock: tm::Clock::new(),
            tsc_frequency: frequency,
            links,
            cpuid: CpuidTable::build(&config, &crate::host_cpuid),
            gim: None,
        });
        Self { ctx, pgm, iom, ram: memory }
    }

    /// An engine for vCPU `id`.
    ///
    /// # Panics
    /// If the host gives no memory for the execution unit.
    pub fn engine(&self, id: u32) -> Iem {
        Iem::new(self.ctx.clone(), VcpuId(id)).expect("execution unit")
    }
}

/// One vCPU on its board.
pub struct Machine {
    pub board: Board,
    pub iem: Iem,
    pub cpu: CpuState,
}

/// Where [`Machine::long`] puts its page tables: identity mapping of the first 4 GiB in 2 MiB pages.
pub const TABLES: u64 = 0x1000;

impl Machine {
    /// A machine in the state after reset, with 4 MiB of RAM.
    pub fn reset() -> Self {
        let board = Board::new(1, 4 << 20);
        let iem = board.engine(0);
        Self { board, iem, cpu: CpuState::reset(0) }
    }

    /// Real mode at 0:`ip`, stack at 0:0x8000.
    pub fn real(ip: u16) -> Self {
        let mut m = Self::reset();
        m.cpu.seg[seg::CS] = Segment::real(0, 3);
        m.cpu.rip = ip.into();
        m.cpu.gpr[4] = 0x8000;
        m
    }

    /// Protected mode at privilege 0 with flat 32-bit segments (without a GDT in memory), no paging.
    pub fn protected(eip: u32) -> Self {
        let mut m = Self::real(0);
        m.cpu.cr0 |= cr0::PE;
        m.cpu.rip = eip.into();
        for s in 0..6 {
            m.cpu.seg[s] = flat(if s == seg::CS { 11 } else { 3 }, 0, false);
        }
        m
    }

    /// 64-bit mode at privilege 0 with everything a kernel turns on; the first 4 GiB mapped to themselves.
    pub fn long(rip: u64) -> Self {
        let mut m = Self::protected(0);
        m.cpu.rip = rip;
        m.cpu.seg[seg::CS] = flat(11, 0, true);
        m.cpu.cr0 |= cr0::PG | cr0::WP | cr0::NE;
        m.cpu.cr4 |= cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        m.cpu.msr.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        m.cpu.cr3 = TABLES;
        m.cpu.xcr0 = 7;
        m.put(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
        for i in 0..4u64 {
            let table = TABLES + 0x2000 + i * 0x1000;
            m.put(TABLES + 0x1000 + 8 * i, &(table | 7).to_le_bytes());
            for j in 0..512u64 {
                let page = (i << 30 | j << 21) | 0x87;
                m.put(table + 8 * j, &page.to_le_bytes());
            }
        }
        m
    }

    /// Writes into RAM.
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.board.pgm.load(GuestPhys(at), bytes).expect("RAM");
    }

    /// Reads RAM.
    pub fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.board.pgm.read(GuestPhys(at), &mut out);
        out
    }

    pub fn u64_at(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    pub fn u32_at(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    pub fn u16_at(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    /// Runs until the engine returns.
    pub fn run(&mut self) -> Exit {
        self.iem.run(&mut self.cpu)
    }

    /// Runs until HLT.
    ///
    /// # Panics
    /// If the engine returns for another reason.
    pub fn run_to_halt(&mut self) {
        let exit = self.run();
        assert!(matches!(exit, Exit::Halt), "{exit:?} at {:#x}", self.cpu.rip);
        self.cpu.activity = cpum::Activity::Running;
    }

    /// Whether an arithmetic flag is set.
    pub fn flag(&self, bit: u64) -> bool {
        self.cpu.rflags & bit != 0
    }
}

/// A flat segment: 64-bit code if `long`, else 32-bit.
pub fn flat(kind: u8, dpl: u8, long: bool) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        attr: Descriptor::new()
            .with_kind(kind)
            .with_code_or_data(true)
            .with_dpl(dpl)
            .with_present(true)
            .with_long(long)
            .with_big(!long)
            .with_granular(true),
        selector: u16::from(dpl) | 8,
    }
}

/// A segment descriptor; `access` is the type byte, `flags` the nibble with G, D/B and L.
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    u64::from(limit & 0xffff)
        | u64::from(base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | u64::from(flags) << 52
        | u64::from(base >> 24) << 56
}

/// A gate of 8 bytes (the first half of a long mode gate).
pub fn gate(selector: u16, offset: u32, access: u8, ist: u8) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(ist) << 32
        | u64::from(access) << 40
        | u64::from(offset >> 16) << 48
}

/// Where [`Machine::tables`] puts the descriptor tables, and where its interrupt handlers stand: vector n at `HANDLERS + 16 * n`.
pub const GDT: u64 = 0x1_0000;
pub const IDT: u64 = 0x1_1000;
pub const TSS: u64 = 0x1_3000;
pub const HANDLERS: u64 = 0x1_4000;
/// Top of the stack that privilege 0 gets from the task state segment, and of interrupt stack 1.
pub const STACK0: u64 = 0x1_8000;
pub const IST1: u64 = 0x1_a000;
/// Selectors of [`Machine::tables`].
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x1b;
pub const DATA3: u16 = 0x23;
pub const TASK: u16 = 0x28;

impl Machine {
    /// Lays out GDT, IDT (every vector ends in HLT, callable from privilege 3) and a task state segment, as the current mode wants
    /// them, and loads the registers.
    pub fn tables(&mut self) {
        let long = self.cpu.msr.efer & efer::LMA != 0;
        let code_flags = if long { 0xa } else { 0xc };
        let tss_limit = 0x67;
        for (n, d) in [
            (1, descriptor(0, 0xfffff, 0x9b, code_flags)),
            (2, descriptor(0, 0xfffff, 0x93, 0xc)),
            (3, descriptor(0, 0xfffff, 0xfb, code_flags)),
            (4, descriptor(0, 0xfffff, 0xf3, 0xc)),
            (5, descriptor(TSS as u32, tss_limit, 0x8b, 0)),
        ] {
            self.put(GDT + 8 * n, &d.to_le_bytes());
        }
        for v in 0..256u64 {
            let handler = HANDLERS + 16 * v;
            self.put(handler, &[0xf4]);
            let g = gate(CODE0, handler as u32, 0xee, 0);
            if long {
                self.put(IDT + 16 * v, &g.to_le_bytes());
                self.put(IDT + 16 * v + 8, &[0; 8]);
            } else {
                self.put(IDT + 8 * v, &g.to_le_bytes());
            }
        }
        if long {
            self.put(TSS + 4, &STACK0.to_le_bytes());
            self.put(TSS + 0x24, &IST1.to_le_bytes());
        } else {
            self.put(TSS + 4, &(STACK0 as u32).to_le_bytes());
            self.put(TSS + 8, &u32::from(DATA0).to_le_bytes());
        }
        self.cpu.gdtr = cpum::state::TableRegister { base: GDT, limit: 0xff };
        self.cpu.idtr = cpum::state::TableRegister { base: IDT, limit: 0xfff };
        self.cpu.tr = Segment {
            base: TSS,
            limit: tss_limit,
            attr: Descriptor::new().with_kind(11).with_present(true),
            selector: TASK,
        };
        for s in 0..6 {
            self.cpu.seg[s].selector = if s == seg::CS { CODE0 } else { DATA0 };
        }
        self.cpu.gpr[4] = 0x9000;
    }

    /// Goes to privilege 3 with the segments of [`Machine::tables`].
    pub fn drop_privilege(&mut self, rip: u64, rsp: u64) {
        let long = self.cpu.msr.efer & efer::LMA != 0;
        for s in 0..6 {
            let (kind, selector) = if s == seg::CS { (11, CODE3) } else { (3, DATA3) };
            self.cpu.seg[s] = Segment { selector, ..flat(kind, 3, long && s == seg::CS) };
        }
        self.cpu.rip = rip;
        self.cpu.gpr[4] = rsp;
    }

    /// The vector whose handler of [`Machine::tables`] the CPU halted in.
    ///
    /// # Panics
    /// If it halted elsewhere.
    pub fn halted_in_handler(&self) -> u8 {
        let at = self.cpu.rip.wrapping_sub(HANDLERS + 1);
        assert!(at.is_multiple_of(16) && at / 16 < 256, "halted at {:#x}", self.cpu.rip);
        (at / 16) as u8
    }
}
