//! Guest programs whose speed says what an engine's parts cost: 64-bit code on a board without devices.
//!
//! Every figure is host CPU time of the thread that runs the engine, so that other work on the machine counts little. Figures that
//! are differences (a TLB miss, for example) subtract the same program without what is measured.

use cpum::state::{TableRegister, cr0, cr4, efer, gpr, seg};
use cpum::{Activity, CpuState, Descriptor, Segment};
use em::{Engine, Event, Exit};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use iem::testing::{descriptor, flat, gate};
use vbox_types::VcpuId;

use crate::board::{Board, Kind, TEST_PORT};
use crate::random::Random;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Million instructions per second.
    Mips,
    /// Nanoseconds for each.
    Nanos,
    /// Million bytes per second.
    Megabytes,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Self::Mips => "MIPS",
            Self::Nanos => "ns",
            Self::Megabytes => "MB/s",
        }
    }
}

/// A line of the table.
pub struct Kernel {
    pub name: &'static str,
    pub unit: Unit,
    /// Gives the figure; the number scales the work (1 is a few hundredths of a second on the recompiler).
    pub run: fn(Kind, u32) -> f64,
}

// Physical layout: the first 2 MiB are mapped to themselves with 4 KiB pages, the data again and again from `WINDOW` on.
const RAM: u64 = 16 << 20;
const GDT: u64 = 0x1_0000;
const IDT: u64 = 0x1_1000;
const TSS: u64 = 0x1_2000;
const STACK0: u64 = 0x1_8000;
const STACK: u64 = 0x1_f000;
const HANDLERS: u64 = 0x2_0000;
const CODE: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
/// Page tables: two trees with the same contents, apart from each other.
const TREES: [u64; 2] = [0x40_0000, 0x60_0000];
/// Device registers, physical and linear.
const REGISTERS: u64 = 0x20_0000;
/// A linear region of pages that all map the data's 512 KiB; one without pages; one of 2 MiB pages.
const WINDOW: u64 = 0x4000_0000;
const WINDOW_PAGES: u64 = 8192;
const NOTHING: u64 = 0x5000_0000;
const LARGE: u64 = 0x8000_0000;
const COLD: u64 = 0x80_0000;

/// Host CPU time of this thread in nanoseconds.
fn cpu_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// A machine with an engine, ready to run code at [`CODE`].
struct Rig {
    board: Board,
    engine: Box<dyn Engine>,
    cpu: CpuState,
    /// Where programs start.
    entry: u64,
}

impl Rig {
    fn new(kind: Kind) -> Self {
        let board = Board::new(1, 0, RAM, &[]);
        board.map_registers(REGISTERS);
        tables(&board);
        let mut cpu = CpuState::reset(0);
        cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
        cpu.cr3 = TREES[0];
        cpu.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PCIDE;
        cpu.msr.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        cpu.msr.star = 0x08 << 32 | 0x10 << 48;
        cpu.msr.lstar = HANDLERS + 0x2000;
        cpu.xcr0 = 7;
        for s in 0..6 {
            cpu.seg[s] = Segment {
                selector: if s == seg::CS { 0x08 } else { 0x10 },
                ..flat(if s == seg::CS { 11 } else { 3 }, 0, s == seg::CS)
            };
        }
        cpu.gdtr = TableRegister { base: GDT, limit: 0xff };
        cpu.idtr = TableRegister { base: IDT, limit: 0xfff };
        cpu.tr = Segment {
            base: TSS,
            limit: 0x67,
            attr: Descriptor::new().with_kind(11).with_present(true),
            selector: 0x30,
        };
        cpu.rip = CODE;
        cpu.gpr[gpr::RSP] = STACK;
        let engine = kind.engine(&board.ctx, VcpuId(0)).expect("an engine");
        Self { board, engine, cpu, entry: CODE }
    }

    fn load(&mut self, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        let mut a = CodeAssembler::new(64).expect("an assembler");
        code(&mut a).expect("code");
        self.board.put(at, &a.assemble(at).expect("code"));
    }

    /// A machine in real mode, with 16-bit code in the segment at [`CODE`] and data at [`DATA`]` - 64 KiB`.
    fn real(kind: Kind, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let mut rig = Self::new(kind);
        rig.cpu = CpuState::reset(0);
        for s in 0..6 {
            let (at, kind) = if s == seg::CS { (CODE, 11) } else { (DATA - 0x1_0000, 3) };
            rig.cpu.seg[s] = Segment::real((at >> 4) as u16, kind);
        }
        rig.cpu.gpr[gpr::RSP] = 0xf000;
        rig.entry = 0;
        let mut a = CodeAssembler::new(16).expect("an assembler");
        code(&mut a).expect("code");
        rig.board.put(CODE, &a.assemble(0).expect("code"));
        rig
    }

    /// To privilege 3.
    fn user(&mut self) {
        for s in 0..6 {
            let code = s == seg::CS;
            self.cpu.seg[s] = Segment {
                selector: if code { 0x23 } else { 0x1b },
                ..flat(if code { 11 } else { 3 }, 3, code)
            };
        }
    }

    /// Runs from [`CODE`] to HLT and gives the nanoseconds.
    fn time(&mut self) -> f64 {
        self.cpu.rip = self.entry;
        self.cpu.activity = Activity::Running;
        self.engine.state_changed(&self.cpu);
        let start = cpu_time();
        let exit = self.engine.run(&mut self.cpu);
        let time = cpu_time() - start;
        assert!(matches!(exit, Exit::Halt), "{exit:?} at 0x{:x}", self.cpu.rip);
        time
    }

    /// The time of the best of three runs.
    fn best(&mut self) -> f64 {
        let (cpu, mut best) = (self.cpu.clone(), f64::MAX);
        for _ in 0..3 {
            self.cpu = cpu.clone();
            best = best.min(self.time());
        }
        best
    }
}

fn tables(board: &Board) {
    for (n, d) in [
        (1, descriptor(0, 0xf_ffff, 0x9b, 0xa)),
        (2, descriptor(0, 0xf_ffff, 0x93, 0xc)),
        (3, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
        (4, descriptor(0, 0xf_ffff, 0xfb, 0xa)),
        (6, descriptor(TSS as u32, 0x67, 0x8b, 0)),
    ] {
        board.put(GDT + 8 * n, &d.to_le_bytes());
    }
    board.put(TSS + 4, &STACK0.to_le_bytes());
    for vector in 0..256u64 {
        let handler = HANDLERS + 16 * vector;
        board.put(IDT + 16 * vector, &gate(0x08, handler as u32, 0xee, 0).to_le_bytes());
        let code: &[u8] = match vector {
            // Page faults: go on behind the two bytes of the access.
            14 => &[0x48, 0x83, 0x44, 0x24, 0x08, 0x02, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf],
            0x20..=0xff => &[0x48, 0xcf],
            _ => &[0xf4],
        };
        board.put(handler, code);
    }
    // SYSCALL's target: SYSRET.
    board.put(HANDLERS + 0x2000, &[0x48, 0x0f, 0x07]);
    for tree in TREES {
        let table = |n: u64| tree + 0x1000 * n;
        let set = |table: u64, index: u64, value: u64| board.put(table + 8 * index, &value.to_le_bytes());
        set(tree, 0, table(1) | 7);
        for gigabyte in 0..3 {
            set(table(1), gigabyte, table(2 + gigabyte) | 7);
        }
        // The first 2 MiB, with the handlers' pages global; the registers and the cold code by large pages.
        set(table(2), 0, table(5) | 7);
        for page in 0..512u64 {
            let kernel = (GDT >> 12..CODE >> 12).contains(&page);
            set(table(5), page, page << 12 | 7 | if kernel { 0x100 } else { 0 });
        }
        for large in 1..8 {
            set(table(2), large, large << 21 | 0x87);
        }
        for n in 0..WINDOW_PAGES / 512 {
            set(table(3), n, table(6 + n) | 7);
            for page in 0..512 {
                set(table(6 + n), page, (DATA + ((page & 127) << 12)) | 7);
            }
        }
        for large in 0..512 {
            set(table(4), large, 0x87);
        }
    }
}

type Code = fn(&mut CodeAssembler, u32) -> Result<(), IcedError>;

/// Instructions per second of a loop of `per` instructions, `rounds` times.
fn mips(kind: Kind, rounds: u32, per: u32, code: Code) -> f64 {
    let mut rig = Rig::new(kind);
    rig.load(CODE, |a| code(a, rounds));
    let time = rig.best();
    f64::from(rounds) * f64::from(per) / time * 1e3
}

/// Nanoseconds of one round of `with` beyond those of `without`.
fn difference(kind: Kind, rounds: u32, prepare: fn(&mut Rig), with: Code, without: Code) -> f64 {
    let each = [with, without].map(|code| {
        let mut rig = Rig::new(kind);
        prepare(&mut rig);
        rig.load(CODE, |a| code(a, rounds));
        rig.best() / f64::from(rounds)
    });
    each[0] - each[1]
}

fn count_down(a: &mut CodeAssembler, rounds: u32) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, rounds)?;
    a.set_label(&mut top)?;
    a.nop()?;
    a.dec(ecx)?;
    a.jne(top)?;
    a.hlt()
}

/// A loop around one thing.
fn around(
    a: &mut CodeAssembler,
    rounds: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(ecx, rounds)?;
    a.set_label(&mut top)?;
    body(a)?;
    a.dec(ecx)?;
    a.jne(top)?;
    a.hlt()
}

/// Like [`around`], at privilege 3 with the counter in r8; ends by an interrupt whose handler halts.
fn around_user(
    a: &mut CodeAssembler,
    rounds: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(r8d, rounds)?;
    a.set_label(&mut top)?;
    body(a)?;
    a.dec(r8d)?;
    a.jne(top)?;
    a.int(3)
}

/// Reads one word of each of `pages` pages from `from` on, `rounds` times.
fn walk(a: &mut CodeAssembler, rounds: u32, from: u64, pages: u64) -> Result<(), IcedError> {
    let (mut top, mut next) = (a.create_label(), a.create_label());
    a.mov(ecx, rounds)?;
    a.set_label(&mut top)?;
    a.mov(rdi, from)?;
    a.mov(edx, pages as u32)?;
    a.set_label(&mut next)?;
    a.mov(rax, qword_ptr(rdi))?;
    a.add(rdi, 0x1000)?;
    a.dec(edx)?;
    a.jne(next)?;
    a.dec(ecx)?;
    a.jne(top)?;
    a.hlt()
}

fn tlb_miss(kind: Kind, scale: u32, from: u64) -> f64 {
    let time = |first: u64, pages: u64, rounds: u32| {
        let mut rig = Rig::new(kind);
        rig.load(CODE, |a| walk(a, rounds, first, pages));
        rig.best() / (f64::from(rounds) * pages as f64)
    };
    // Eight times what the TLB holds, against what it holds easily.
    time(from, WINDOW_PAGES, 8 * scale) - time(from, 64, 1024 * scale)
}

/// Time for code that is new, and for the same code when it is known: per instruction block and per byte.
fn cold_code(kind: Kind, scale: u32) -> (f64, f64) {
    const BLOCKS: u64 = 20_000;
    let mut rig = Rig::new(kind);
    let mut random = Random(7);
    let mut image = Vec::new();
    // Blocks of six instructions, a load and a store among them, each ended by a branch that is not taken.
    for _ in 0..BLOCKS {
        for n in 0..5 {
            match (n, random.below(6)) {
                (1, _) => image.extend([0x48, 0x8b, 0x87]), // mov rax, [rdi + d]
                (3, _) => image.extend([0x48, 0x89, 0x97]), // mov [rdi + d], rdx
                (_, 0) => image.extend([0x48, 0x05]),       // add rax, i
                (_, 1) => image.extend([0x48, 0x81, 0xf2]), // xor rdx, i
                (_, 2) => image.extend([0x48, 0x81, 0xc6]), // add rsi, i
                (_, 3) => image.extend([0x48, 0x8d, 0x96]), // lea rdx, [rsi + d]
                (_, 4) => image.extend([0x48, 0x81, 0xeb]), // sub rbx, i
                _ => image.extend([0x48, 0x69, 0xc0]),      // imul rax, rax, i
            }
            image.extend((random.below(0x3000) as u32 * 8).to_le_bytes());
        }
        // test ecx, ecx; je past the end: not taken.
        image.extend([0x85, 0xc9, 0x0f, 0x84]);
        image.extend(0x10_0000u32.to_le_bytes());
    }
    image.push(0xc3);
    rig.board.put(COLD, &image);
    rig.load(CODE, |a| {
        a.mov(rdi, DATA)?;
        a.mov(ecx, 1)?;
        a.mov(rax, COLD)?;
        a.call(rax)?;
        a.hlt()
    });
    // Engines may interpret code before they think it worth translating.
    let (mut cold, mut hot) = (0.0, f64::MAX);
    let mut times = Vec::new();
    for _ in 0..12 + scale.min(8) {
        let cpu = rig.cpu.clone();
        times.push(rig.time());
        rig.cpu = cpu;
    }
    for t in &times {
        hot = hot.min(*t);
    }
    for t in &times {
        if *t > 2.0 * hot {
            cold += t - hot;
        }
    }
    (cold / BLOCKS as f64, image.len() as f64 / cold * 1e3)
}

/// The table.
pub const KERNELS: &[Kernel] = &[
    Kernel {
        name: "loop of two instructions",
        unit: Unit::Mips,
        run: |k, s| {
            mips(k, 4_000_000 * s, 2, |a, n| {
                let mut top = a.create_label();
                a.mov(ecx, n)?;
                a.set_label(&mut top)?;
                a.dec(ecx)?;
                a.jne(top)?;
                a.hlt()
            })
        },
    },
    Kernel {
        name: "registers",
        unit: Unit::Mips,
        run: |k, s| {
            mips(k, 1_000_000 * s, 8, |a, n| {
                around(a, n, |a| {
                    a.lea(rax, ptr(rcx + rcx * 4 + 3))?;
                    a.xor(rdx, rax)?;
                    a.shl(rax, 5)?;
                    a.add(rbx, rax)?;
                    a.mov(rsi, rbx)?;
                    a.and(esi, 0xff)
                })
            })
        },
    },
    Kernel {
        name: "memory",
        unit: Unit::Mips,
        run: |k, s| {
            mips(k, 1_000_000 * s, 7, |a, n| {
                a.mov(rdi, DATA)?;
                around(a, n, |a| {
                    a.mov(rax, qword_ptr(rdi + 8))?;
                    a.add(rax, qword_ptr(rdi + 16))?;
                    a.mov(qword_ptr(rdi + 24), rax)?;
                    a.inc(dword_ptr(rdi))?;
                    a.movzx(edx, byte_ptr(rdi + 3))
                })
            })
        },
    },
    Kernel {
        name: "calls",
        unit: Unit::Mips,
        run: |k, s| {
            mips(k, 1_000_000 * s, 7, |a, n| {
                let (mut top, mut function) = (a.create_label(), a.create_label());
                a.mov(ecx, n)?;
                a.set_label(&mut top)?;
                a.call(function)?;
                a.dec(ecx)?;
                a.jne(top)?;
                a.hlt()?;
                a.set_label(&mut function)?;
                a.push(rbx)?;
                a.mov(ebx, ecx)?;
                a.pop(rbx)?;
                a.ret()
            })
        },
    },
    Kernel {
        name: "16-bit code, in segments",
        unit: Unit::Mips,
        run: |k, s| {
            let rounds = 500_000 * s;
            let mut rig = Rig::real(k, |a| {
                a.mov(si, 0x100)?;
                around(a, rounds, |a| {
                    a.mov(ax, word_ptr(bx + si))?;
                    a.add(ax, cx)?;
                    a.mov(word_ptr(di).es(), ax)?;
                    a.push(ax)?;
                    a.pop(dx)?;
                    a.xor(dx, word_ptr(bp + 6))
                })
            });
            f64::from(rounds) * 8.0 / rig.best() * 1e3
        },
    },
    Kernel {
        name: "indirect jumps, 4 targets",
        unit: Unit::Mips,
        run: |k, s| {
            mips(k, 1_000_000 * s, 9, |a, n| {
                // Four targets of 16 bytes each.
                let (mut top, mut targets, mut next) = (a.create_label(), a.create_label(), a.create_label());
                a.mov(ecx, n)?;
                a.lea(rdi, ptr(targets))?;
                a.set_label(&mut top)?;
                a.mov(eax, ecx)?;
                a.and(eax, 3)?;
                a.shl(eax, 4)?;
                a.add(rax, rdi)?;
                a.jmp(rax)?;
                a.set_label(&mut targets)?;
                for _ in 0..4 {
                    a.inc(rbx)?;
                    a.jmp(next)?;
                    a.nops_with_size(11)?;
                }
                a.set_label(&mut next)?;
                a.dec(ecx)?;
                a.jne(top)?;
                a.hlt()?;
                Ok(())
            })
        },
    },
    Kernel {
        name: "SSE",
        unit: Unit::Mips,
        run: |k, s| {
            mips(k, 1_000_000 * s, 7, |a, n| {
                a.mov(rdi, DATA)?;
                around(a, n, |a| {
                    a.movups(xmm0, xmmword_ptr(rdi))?;
                    a.paddd(xmm0, xmm1)?;
                    a.mulps(xmm2, xmm0)?;
                    a.addsd(xmm3, xmm2)?;
                    a.movups(xmmword_ptr(rdi), xmm0)
                })
            })
        },
    },
    Kernel {
        name: "REP MOVSB of 4 KiB",
        unit: Unit::Megabytes,
        run: |k, s| {
            let rounds = 20_000 * s;
            let mut rig = Rig::new(k);
            rig.load(CODE, |a| {
                a.mov(ebx, rounds)?;
                let mut top = a.create_label();
                a.set_label(&mut top)?;
                a.mov(esi, DATA as u32)?;
                a.mov(edi, DATA as u32 + 0x8000)?;
                a.mov(ecx, 4096)?;
                a.rep().movsb()?;
                a.dec(ebx)?;
                a.jne(top)?;
                a.hlt()
            });
            f64::from(rounds) * 4096.0 / rig.best() * 1e3
        },
    },
    Kernel { name: "code never seen before", unit: Unit::Megabytes, run: |k, s| cold_code(k, s).1 },
    Kernel { name: "a block never seen before", unit: Unit::Nanos, run: |k, s| cold_code(k, s).0 },
    Kernel {
        name: "code changed and run (8 times each)",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                5_000 * s,
                |_| {},
                |a, n| {
                    // Writes the immediate of a function, and calls it a few times.
                    a.mov(rdi, CODE + 0x2001)?;
                    a.mov(byte_ptr(rdi - 1), 0xb8u32 as i32)?;
                    a.mov(byte_ptr(rdi + 4), 0xc3u32 as i32)?;
                    a.lea(rsi, qword_ptr(rdi - 1))?;
                    around(a, n, |a| {
                        a.mov(dword_ptr(rdi), ecx)?;
                        for _ in 0..8 {
                            a.call(rsi)?;
                        }
                        Ok(())
                    })
                },
                |a, n| {
                    a.mov(rdi, CODE + 0x2001)?;
                    a.mov(byte_ptr(rdi - 1), 0xb8u32 as i32)?;
                    a.mov(byte_ptr(rdi + 4), 0xc3u32 as i32)?;
                    a.lea(rsi, qword_ptr(rdi - 1))?;
                    around(a, n, |a| {
                        a.mov(dword_ptr(rdi + 0x10000), ecx)?;
                        for _ in 0..8 {
                            a.call(rsi)?;
                        }
                        Ok(())
                    })
                },
            )
        },
    },
    Kernel { name: "TLB miss, 4 KiB page", unit: Unit::Nanos, run: |k, s| tlb_miss(k, s, WINDOW) },
    Kernel { name: "TLB miss, 2 MiB page", unit: Unit::Nanos, run: |k, s| tlb_miss(k, s, LARGE) },
    Kernel {
        name: "port write",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                100_000 * s,
                |_| {},
                |a, n| {
                    a.mov(edx, u32::from(TEST_PORT))?;
                    around(a, n, |a| a.out(dx, al))
                },
                count_down,
            )
        },
    },
    Kernel {
        name: "write to device registers",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                100_000 * s,
                |_| {},
                |a, n| {
                    a.mov(rdi, REGISTERS)?;
                    around(a, n, |a| a.mov(dword_ptr(rdi), eax))
                },
                count_down,
            )
        },
    },
    Kernel {
        name: "CPUID",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                50_000 * s,
                |_| {},
                |a, n| {
                    a.mov(r8d, n)?;
                    let mut top = a.create_label();
                    a.set_label(&mut top)?;
                    a.xor(eax, eax)?;
                    a.cpuid()?;
                    a.dec(r8d)?;
                    a.jne(top)?;
                    a.hlt()
                },
                count_down,
            )
        },
    },
    Kernel {
        name: "SYSCALL and SYSRET",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                200_000 * s,
                Rig::user,
                |a, n| around_user(a, n, |a| a.syscall()),
                |a, n| around_user(a, n, |a| a.nop()),
            )
        },
    },
    Kernel {
        name: "page fault and IRET, from privilege 3",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                100_000 * s,
                Rig::user,
                |a, n| {
                    a.mov(rdi, NOTHING)?;
                    around_user(a, n, |a| a.mov(eax, dword_ptr(rdi)))
                },
                |a, n| around_user(a, n, |a| a.nop()),
            )
        },
    },
    Kernel {
        name: "INT and IRET, from privilege 3",
        unit: Unit::Nanos,
        run: |k, s| {
            difference(
                k,
                100_000 * s,
                Rig::user,
                |a, n| around_user(a, n, |a| a.int(0x80)),
                |a, n| around_user(a, n, |a| a.nop()),
            )
        },
    },
    Kernel {
        name: "HLT, interrupt and IRET",
        unit: Unit::Nanos,
        run: |k, s| {
            let rounds = 100_000 * s;
            let mut rig = Rig::new(k);
            rig.load(CODE, |a| {
                let mut top = a.create_label();
                a.set_label(&mut top)?;
                a.sti()?;
                a.hlt()?;
                a.jmp(top)
            });
            rig.time();
            let start = cpu_time();
            for _ in 0..rounds {
                rig.engine.inject(&mut rig.cpu, Event::Interrupt(0x40)).expect("an interrupt");
                let exit = rig.engine.run(&mut rig.cpu);
                assert!(matches!(exit, Exit::Halt), "{exit:?}");
            }
            (cpu_time() - start) / f64::from(rounds)
        },
    },
    Kernel { name: "address space, and 32 pages of it", unit: Unit::Nanos, run: |k, s| switch(k, s, false) },
    Kernel {
        name: "address space with PCID, and 32 pages of it",
        unit: Unit::Nanos,
        run: |k, s| switch(k, s, true),
    },
];

/// A load of CR3 and reads of 32 pages; the reads alone are taken off.
fn switch(kind: Kind, scale: u32, tagged: bool) -> f64 {
    let rounds = 10_000 * scale;
    let run = |change: bool| {
        let mut rig = Rig::new(kind);
        rig.load(CODE, |a| {
            let (mut top, mut page) = (a.create_label(), a.create_label());
            a.mov(rbx, TREES[0])?;
            a.mov(rbp, TREES[1])?;
            if tagged {
                a.or(rbp, 1)?;
                a.mov(rax, 1u64 << 63)?;
                a.or(rbp, rax)?;
                a.or(rbx, rax)?;
            }
            a.mov(ecx, rounds)?;
            a.set_label(&mut top)?;
            a.xchg(rbx, rbp)?;
            if change {
                a.mov(cr3, rbx)?;
            }
            a.mov(rdi, WINDOW)?;
            a.mov(edx, 32)?;
            a.set_label(&mut page)?;
            a.mov(rax, qword_ptr(rdi))?;
            a.add(rdi, 0x1000)?;
            a.dec(edx)?;
            a.jne(page)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        });
        rig.best() / f64::from(rounds)
    };
    run(true) - run(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More address spaces than engines keep.
    const COUNT: u64 = 12;
    const LIST: u64 = 0x5_0000;
    const USER_STACK: u64 = 0x6_0800;
    const FREE: u64 = 0xa0_0000;

    fn page_of(space: u64) -> u64 {
        FREE + 0x8000 * space
    }

    /// What space `n` adds to RBX: by its code, and by its data.
    fn values(n: u64) -> (u64, u64) {
        (0x1_0000 + n * n, 7 * n + 1)
    }

    /// A window of two pages, code and data, that each address space maps elsewhere.
    fn space(board: &Board, n: u64) {
        let set = |at: u64, value: u64| board.put(at, &value.to_le_bytes());
        let at = page_of(n);
        let own = |k: u64| at + 0x1000 * k;
        set(own(0), own(1) | 7);
        set(own(1), (TREES[0] + 0x2000) | 7);
        set(own(1) + 8, own(2) | 7);
        set(own(2), own(3) | 7);
        for page in 0..3 {
            set(own(3) + 8 * page, own(4 + page) | 7);
        }
        let (by_code, by_data) = values(n);
        let mut code = vec![0x48, 0x81, 0xc3];
        code.extend_from_slice(&(by_code as u32).to_le_bytes());
        code.extend_from_slice(&[0x48, 0x03, 0x1e, 0x0f, 0x05]);
        board.put(own(4), &code);
        set(own(5), by_data);
        set(own(6), by_data + 1000);
    }

    /// Goes round all address spaces `rounds` times through IRET and SYSCALL, then takes away the data page of two and says so in
    /// two ways, and goes round once more. Gives RBX.
    fn go_round(kind: Kind, rounds: u32) -> u64 {
        let mut rig = Rig::new(kind);
        for n in 0..COUNT {
            space(&rig.board, n);
            rig.board.put(LIST + 8 * n, &(page_of(n) | n | 1 << 63).to_le_bytes());
        }
        let back = CODE + 0x800;
        rig.cpu.msr.lstar = back;
        rig.cpu.cr3 = page_of(0);
        rig.load(CODE, |a| {
            a.mov(r8d, rounds)?;
            a.mov(r9d, 1)?;
            a.xor(ebx, ebx)?;
            a.mov(r10d, COUNT as u32 - 1)?;
            a.jmp(back - 0x100)
        });
        // One address space: to privilege 3.
        rig.load(back - 0x100, |a| {
            a.mov(rax, qword_ptr(LIST as i32 + r10 * 8))?;
            a.mov(cr3, rax)?;
            a.mov(rsi, WINDOW + 0x1000)?;
            a.mov(rax, WINDOW)?;
            a.push(0x1b)?;
            a.push(USER_STACK as i32)?;
            a.push(2)?;
            a.push(0x23)?;
            a.push(rax)?;
            a.iretq()
        });
        rig.load(back, |a| {
            let (mut last, mut end) = (a.create_label(), a.create_label());
            a.mov(rsp, STACK)?;
            a.dec(r10d)?;
            a.jns(back - 0x100)?;
            a.mov(r10d, COUNT as u32 - 1)?;
            a.dec(r8d)?;
            a.jne(back - 0x100)?;
            a.dec(r9d)?;
            a.jne(end)?;
            a.set_label(&mut last)?;
            a.mov(r8d, 1)?;
            for n in [3, 5] {
                a.mov(rax, page_of(n) + 0x3008)?;
                a.mov(rdx, page_of(n) + 0x6007)?;
                a.mov(qword_ptr(rax), rdx)?;
            }
            // Space 3 by INVPCID, space 5 by a load of CR3 that does not keep it.
            a.mov(qword_ptr(LIST as i32 + 0x100), 3)?;
            a.mov(qword_ptr(LIST as i32 + 0x108), 0)?;
            a.mov(eax, 1)?;
            a.mov(rdi, LIST + 0x100)?;
            a.invpcid(rax, xmmword_ptr(rdi))?;
            a.btr(qword_ptr(LIST as i32 + 8 * 5), 63)?;
            a.jmp(back - 0x100)?;
            a.set_label(&mut end)?;
            a.hlt()
        });
        rig.time();
        rig.cpu.gpr[gpr::RBX]
    }

    #[test]
    fn address_spaces_with_pcids_are_kept_apart() {
        let round: u64 = (0..COUNT).map(|n| values(n).0 + values(n).1).sum();
        for kind in Kind::ALL {
            assert_eq!(go_round(*kind, 3), 4 * round + 2 * 1000, "{kind:?}");
        }
    }
}
