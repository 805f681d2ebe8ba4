//! The interpreter as executor: a small 64-bit machine whose sequences run at privilege level 3 and end in an interrupt handler
//! that halts.

use std::sync::Arc;

use cpum::state::{CODE_RX, DATA_RW, TableRegister, cr0, cr4, efer, rflags, seg};
use cpum::{Activity, CpuState, Descriptor, Segment};
use em::{Engine, Exit};
use iem::Iem;
use iem::testing::{Board, descriptor, flat};
use pgm::HostMemory;

use super::generate::{Assembled, Case};
use super::{CODE, CODE_LEN, DATA, DATA_LEN, Outcome, State, TABLE_LEN, Trap, USER_CODE, USER_STACK};

/// Linear address of physical address zero for the handlers and their tables: a place that random addresses do not hit and
/// that the host does not use.
const SYSTEM: u64 = 0x6eaf_0000_0000;
// Physical layout.
const TABLES: u64 = 0x1000;
const GDT: u64 = 0xa000;
const IDT: u64 = 0xb000;
const TSS: u64 = 0xc000;
/// One HLT for each vector, 16 bytes apart.
const HANDLERS: u64 = 0xd000;
const STACK_TOP: u64 = 0xf000;
const DATA_AT: u64 = 0x10_0000;
const CODE_AT: u64 = 0x20_0000;
const RAM: u64 = 4 << 20;

const KERNEL_CODE: u16 = 0x10;
const TASK: u16 = 0x40;
const VECTORS: u64 = 32;

pub struct Guest {
    iem: Iem,
    cpu: CpuState,
    ram: Arc<HostMemory>,
    start: CpuState,
}

impl Guest {
    pub fn new() -> Self {
        let board = Board::new(1, RAM);
        let iem = board.engine(0);
        let ram = board.ram.clone();
        let put = |at: u64, value: u64| assert!(ram.write(at, &value.to_le_bytes()));

        // PML4; then PDPT, PD and page table for the system, and the same for data and code.
        let pml4 = TABLES;
        let table = |i: u64| TABLES + 0x1000 * i;
        put(pml4 + (SYSTEM >> 39 & 511) * 8, table(1) | 3);
        put(table(1) + (SYSTEM >> 30 & 511) * 8, table(2) | 3);
        put(pml4, table(3) | 7);
        put(table(3), table(4) | 7);
        for (i, (linear, physical, len, flags)) in [
            (SYSTEM, 0, 0x10_0000, 3),
            (DATA, DATA_AT, (DATA_LEN + TABLE_LEN) as u64, 7),
            (CODE, CODE_AT, CODE_LEN as u64, 5),
        ]
        .into_iter()
        .enumerate()
        {
            let directory = if i == 0 { table(2) } else { table(4) };
            let table = table(5 + i as u64);
            put(directory + (linear >> 21 & 511) * 8, table | 7);
            for page in (0..len).step_by(4096) {
                put(table + ((linear + page) >> 12 & 511) * 8, (physical + page) | flags);
            }
        }
        put(GDT + u64::from(KERNEL_CODE), descriptor(0, 0xf_ffff, 0x9b, 0xa));
        put(GDT + u64::from(USER_STACK & !3), descriptor(0, 0xf_ffff, 0xf3, 0xc));
        put(GDT + u64::from(USER_CODE & !3), descriptor(0, 0xf_ffff, 0xfb, 0xa));
        // No I/O permission map.
        put(TSS + 0x60, 0x68 << 48);
        put(TSS + 4, SYSTEM + STACK_TOP);
        for vector in 0..VECTORS {
            let handler = SYSTEM + HANDLERS + 16 * vector;
            // A 64-bit interrupt gate that privilege level 3 may call.
            put(
                IDT + 16 * vector,
                handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0xee00 << 32 | (handler >> 16) << 48,
            );
            put(IDT + 16 * vector + 8, handler >> 32);
            assert!(ram.write(handler - SYSTEM, &[0xf4]));
        }

        let mut cpu = CpuState::reset(0);
        cpu.cr0 = cr0::PE | cr0::PG | cr0::MP | cr0::NE | cr0::ET | cr0::WP | cr0::AM;
        cpu.cr3 = pml4;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.msr.efer = efer::LME | efer::LMA | efer::SCE;
        cpu.xcr0 = 7;
        let segment = |selector: u16, kind, long| {
            let mut segment = flat(kind, 3, long);
            segment.selector = selector;
            segment
        };
        // Null, as Linux leaves them in 64-bit programs.
        cpu.seg = [Segment { selector: 0, ..segment(0, DATA_RW, false) }; 6];
        cpu.seg[seg::SS] = segment(USER_STACK, DATA_RW, false);
        cpu.seg[seg::CS] = segment(USER_CODE, CODE_RX, true);
        cpu.gdtr = TableRegister { base: SYSTEM + GDT, limit: 0x4f };
        cpu.idtr = TableRegister { base: SYSTEM + IDT, limit: (16 * VECTORS - 1) as u16 };
        cpu.tr = Segment {
            base: SYSTEM + TSS,
            limit: 0x67,
            attr: Descriptor::new().with_kind(11).with_present(true),
            selector: TASK,
        };
        Self { iem, cpu: cpu.clone(), ram, start: cpu }
    }

    pub fn run(&mut self, case: &Case, assembled: &Assembled) -> Outcome {
        assert!(self.ram.write(CODE_AT, &assembled.bytes));
        assert!(
            self.ram.write(DATA_AT, &case.data) && self.ram.write(DATA_AT + DATA_LEN as u64, &case.table)
        );
        let cpu = &mut self.cpu;
        *cpu = self.start.clone();
        cpu.gpr = case.start.gpr;
        cpu.rip = case.start.rip;
        cpu.rflags = case.start.rflags;
        cpu.xsave = case.start.xsave.clone();
        cpu.xsave.0[512] = 7;
        self.iem.state_changed(cpu);
        let exit = self.iem.run(cpu);
        assert!(matches!(exit, Exit::Halt), "{exit:?} at {:#x}", cpu.rip);
        cpu.activity = Activity::Running;

        let vector = ((cpu.rip - 1 - HANDLERS - SYSTEM) / 16) as u8;
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21);
        let mut frame = [0; 48];
        let frame = &mut frame[..if has_code { 48 } else { 40 }];
        let at = cpu.gpr[4] - SYSTEM;
        assert_eq!(at + frame.len() as u64, STACK_TOP, "frame of vector {vector}");
        assert!(self.ram.read(at, frame));
        let mut words = frame.chunks_exact(8).map(|b| {
            let mut word = [0; 8];
            word.copy_from_slice(b);
            u64::from_le_bytes(word)
        });
        let mut word = || words.next().unwrap_or(0);
        let code = if has_code { word() as u32 } else { 0 };
        let (rip, _cs, flags, rsp) = (word(), word(), word(), word());
        let mut gpr = cpu.gpr;
        gpr[4] = rsp;
        let mut data = vec![0; DATA_LEN];
        assert!(self.ram.read(DATA_AT, &mut data));
        Outcome {
            state: State { gpr, rip, rflags: flags & !rflags::RF, xsave: cpu.xsave.clone() },
            trap: Trap { vector, code, address: cpu.cr2 },
            data,
        }
    }
}
