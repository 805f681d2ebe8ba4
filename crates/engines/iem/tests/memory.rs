//! Paging, the software TLB, self-modifying code, atomics and string instructions.

use cpum::state::{cr0, cr4, rflags};
use em::Engine;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use iem::testing::*;

const CODE: u64 = 0x2_0000;
/// A linear page that [`small`] maps to `FRAME` with a table entry at `PTE`.
const PAGE: u64 = 0x4000_0000;
const FRAME: u64 = 0x10_0000;
const PTE: u64 = 0x18_1000;

fn assemble(bits: u32, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    code(&mut a).unwrap();
    a.assemble(at).unwrap()
}

fn long(code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = Machine::long(CODE);
    m.tables();
    let bytes = assemble(64, CODE, code);
    m.put(CODE, &bytes);
    m
}

/// The same with 4 KiB pages from `PAGE` on: the first leads to `FRAME` with the flags given, the second to the frame behind.
fn small(flags: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Machine {
    let mut m = long(code);
    let directory = TABLES + 0x3000; // of the second GiB
    m.put(directory, &(PTE | 7).to_le_bytes());
    m.put(PTE, &(FRAME | flags).to_le_bytes());
    m.put(PTE + 8, &((FRAME + 0x1000) | flags).to_le_bytes());
    m
}

/// Runs code that page-faults; gives the error code.
fn page_fault(m: &mut Machine) -> u64 {
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 14);
    m.u64_at(m.cpu.gpr[4])
}

fn read_page(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rdi, PAGE)?;
    a.mov(eax, dword_ptr(rdi + 0x10))?;
    a.hlt()
}

fn write_page(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rdi, PAGE)?;
    a.mov(dword_ptr(rdi + 0x10), eax)?;
    a.hlt()
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;

#[test]
fn accesses_set_accessed_and_writes_set_dirty() {
    let mut m = small(P | W, read_page);
    m.put(FRAME + 0x10, &7u32.to_le_bytes());
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[0], m.u64_at(PTE) & 0xfff), (7, P | W | 0x20));
    let mut m = small(P | W, |a| {
        read_page(a)?;
        write_page(a)
    });
    m.run_to_halt();
    m.run_to_halt();
    assert_eq!(m.u64_at(PTE) & 0xfff, P | W | 0x60);
}

#[test]
fn page_fault_codes_tell_presence_write_and_user() {
    assert_eq!(page_fault(&mut small(0, read_page)), 0);
    assert_eq!(page_fault(&mut small(0, write_page)), 2);
    assert_eq!(page_fault(&mut small(P, write_page)), 3);
    let mut m = small(P | W, read_page);
    m.drop_privilege(CODE, 0x9000);
    assert_eq!(page_fault(&mut m), 5);
    let mut m = small(P | U, write_page);
    m.drop_privilege(CODE, 0x9000);
    assert_eq!(page_fault(&mut m), 7);
    assert_eq!(m.cpu.cr2, PAGE + 0x10);
    let mut m = small(P | W | 1 << 51, read_page);
    assert_eq!(page_fault(&mut m), 9);
}

#[test]
fn fetches_obey_nx_and_smep() {
    let jump = |a: &mut CodeAssembler| {
        a.mov(rdi, PAGE)?;
        a.jmp(rdi)
    };
    let mut m = small(P | W | 1 << 63, jump);
    assert_eq!(page_fault(&mut m), 17);
    assert_eq!((m.cpu.cr2, m.u64_at(m.cpu.gpr[4] + 8)), (PAGE, PAGE));
    let mut m = small(P | W | U, jump);
    m.put(FRAME, &[0xf4]);
    m.run_to_halt();
    assert_eq!(m.cpu.rip, PAGE + 1);
    let mut m = small(P | W | U, jump);
    m.cpu.cr4 |= cr4::SMEP;
    // The tables' own mapping must be supervisor-only for the code to run at all.
    for i in 0..512u64 {
        m.put(TABLES + 0x2000 + 8 * i, &(i << 21 | 0x83).to_le_bytes());
    }
    assert_eq!(page_fault(&mut m), 17);
}

#[test]
fn smap_stops_supervisor_accesses_unless_ac_is_set() {
    let supervisor_only = |m: &mut Machine| {
        for i in 0..512u64 {
            m.put(TABLES + 0x2000 + 8 * i, &(i << 21 | 0x83).to_le_bytes());
        }
        m.cpu.cr4 |= cr4::SMAP;
    };
    let mut m = small(P | W | U, read_page);
    supervisor_only(&mut m);
    assert_eq!(page_fault(&mut m), 1);
    let mut m = small(P | W | U, |a| {
        a.stac()?;
        read_page(a)?;
        a.clac()?;
        read_page(a)
    });
    supervisor_only(&mut m);
    m.run_to_halt();
    assert_eq!(page_fault(&mut m), 1);
}

#[test]
fn write_protection_binds_the_supervisor_only_with_wp() {
    let mut m = small(P, write_page);
    m.cpu.cr0 &= !cr0::WP;
    m.run_to_halt();
    assert_eq!(page_fault(&mut small(P, write_page)), 3);
}

#[test]
fn invlpg_and_cr3_forget_translations_but_cr3_keeps_global_ones() {
    let remap = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        read_page(a)?; // fills
        a.mov(rbx, PTE)?;
        a.add(dword_ptr(rbx), 0x1000)?;
        read_page(a)?; // may be stale
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        read_page(a)?;
        a.invlpg(ptr(rdi))?;
        read_page(a)
    };
    for (global, after_cr3) in [(0, 2), (1 << 8, 1)] {
        let mut m = small(P | W | global, remap);
        m.put(FRAME + 0x10, &1u32.to_le_bytes());
        m.put(FRAME + 0x1010, &2u32.to_le_bytes());
        m.run_to_halt();
        assert_eq!(m.cpu.gpr[0], 1);
        m.run_to_halt();
        m.run_to_halt();
        assert_eq!(m.cpu.gpr[0], after_cr3, "global {global:#x}");
        m.run_to_halt();
        assert_eq!(m.cpu.gpr[0], 2);
    }
}

#[test]
fn operands_across_pages_fault_before_anything_is_written() {
    let mut m = small(P | W, |a| {
        a.mov(rdi, PAGE + 0xffd)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(rbx, qword_ptr(rdi))?;
        a.hlt()
    });
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[3], 0x1122_3344_5566_7788);
    assert_eq!(m.bytes::<8>(FRAME + 0xffd), 0x1122_3344_5566_7788u64.to_le_bytes());
    let mut m = small(P | W, |a| {
        a.mov(rdi, PAGE + 0xffd)?;
        a.mov(qword_ptr(rdi), rdi)
    });
    m.put(PTE + 8, &[0; 8]);
    assert_eq!((page_fault(&mut m), m.cpu.cr2), (2, PAGE + 0x1000));
    assert_eq!(m.bytes::<3>(FRAME + 0xffd), [0; 3]);
}

#[test]
fn instructions_across_pages_run_and_fault_at_the_second_page() {
    let mut m = small(P | W, |a| {
        a.mov(rdi, PAGE + 0xffe)?;
        a.jmp(rdi)
    });
    m.put(FRAME + 0xffe, &[0xb8, 0x78, 0x56, 0x34, 0x12, 0xf4]); // mov eax, 0x12345678; hlt
    m.run_to_halt();
    assert_eq!((m.cpu.gpr[0], m.cpu.rip), (0x1234_5678, PAGE + 0x1004));
    m.put(FRAME + 0x1000, &[0x99]);
    m.cpu.rip = PAGE + 0xffe;
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[0], 0x1234_9978);
    m.put(PTE + 8, &[0; 8]);
    m.iem.state_changed(&m.cpu);
    m.cpu.rip = PAGE + 0xffe;
    page_fault(&mut m);
    assert_eq!((m.cpu.cr2, m.u64_at(m.cpu.gpr[4] + 8)), (PAGE + 0x1000, PAGE + 0xffe));
}

#[test]
fn self_modified_code_is_seen_at_once() {
    // The store changes the immediate of the instruction behind it, in the same block.
    let mut m = long(|a| {
        let mut patched = a.create_label();
        a.lea(rbx, ptr(patched))?;
        a.mov(byte_ptr(rbx + 1), 0x42)?;
        a.set_label(&mut patched)?;
        a.mov(eax, 0x11)?;
        a.hlt()
    });
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[0], 0x42);
    // A loop that patches itself each time round.
    let mut m = long(|a| {
        let (mut patched, mut again) = (a.create_label(), a.create_label());
        a.xor(edx, edx)?;
        a.mov(ecx, 1000)?;
        a.lea(rbx, ptr(patched))?;
        a.set_label(&mut again)?;
        a.mov(byte_ptr(rbx + 1), cl)?;
        a.set_label(&mut patched)?;
        a.mov(al, 0)?;
        a.movzx(eax, al)?;
        a.add(edx, eax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[2], (1..=1000u64).map(|i| i & 0xff).sum::<u64>());
}

#[test]
fn code_changed_from_outside_is_decoded_anew() {
    let mut m = long(|a| {
        a.mov(eax, 1)?;
        a.hlt()
    });
    m.run_to_halt();
    m.put(CODE + 1, &[5]);
    m.cpu.rip = CODE;
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[0], 5);
}

#[test]
fn code_patched_by_one_cpu_is_seen_by_the_other() {
    let board = Machine::long(CODE).board;
    drop(board);
    // CPU 1 calls a function over and over until it returns zero; CPU 0 patches the function meanwhile.
    let first = Machine::long(CODE);
    let board = Board::new(2, 4 << 20);
    let mut image = vec![0; 0x8000];
    first.board.ram.read(0, &mut image);
    board.ram.write(0, &image);
    let caller = assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(rbx, 0x3_0000u64)?;
        a.set_label(&mut again)?;
        a.call(rbx)?;
        a.inc(qword_ptr(0x5000))?;
        a.test(eax, eax)?;
        a.jne(again)?;
        a.hlt()
    });
    let patcher = assemble(64, CODE + 0x1000, |a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(0x5000), 1000)?;
        a.jb(wait)?;
        a.mov(rbx, 0x3_0000u64)?;
        a.mov(byte_ptr(rbx + 1), 0)?;
        a.hlt()
    });
    board.ram.write(CODE, &caller);
    board.ram.write(CODE + 0x1000, &patcher);
    board.ram.write(0x3_0000, &[0xb8, 1, 0, 0, 0, 0xc3]); // mov eax, 1; ret
    let threads: Vec<_> = (0..2u32)
        .map(|id| {
            let mut engine = board.engine(id);
            let mut cpu = first.cpu.clone();
            cpu.id = id;
            cpu.rip = CODE + if id == 0 { 0x1000 } else { 0 };
            cpu.gpr[4] = 0x9000 + u64::from(id) * 0x1000;
            std::thread::spawn(move || engine.run(&mut cpu))
        })
        .collect();
    for thread in threads {
        assert!(matches!(thread.join().unwrap(), em::Exit::Halt));
    }
}

#[test]
fn locked_instructions_of_two_cpus_lose_no_update() {
    let first = Machine::long(CODE);
    let board = Board::new(2, 4 << 20);
    let mut image = vec![0; 0x8000];
    first.board.ram.read(0, &mut image);
    board.ram.write(0, &image);
    const COUNT: u64 = 200_000;
    // Aligned, unaligned, across cache lines, and across pages.
    let places = [0x10_0000u64, 0x10_0009, 0x10_003e, 0x10_0ffd];
    let code = assemble(64, CODE, |a| {
        let (mut again, mut retry) = (a.create_label(), a.create_label());
        a.mov(ecx, COUNT as i32)?;
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(places[0]))?;
        a.lock().add(dword_ptr(places[1]), 1)?;
        a.mov(edx, 1)?;
        a.lock().xadd(dword_ptr(places[2]), edx)?;
        a.set_label(&mut retry)?;
        a.mov(eax, dword_ptr(places[3]))?;
        a.lea(edx, dword_ptr(rax + 1))?;
        a.lock().cmpxchg(dword_ptr(places[3]), edx)?;
        a.jne(retry)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    board.ram.write(CODE, &code);
    let threads: Vec<_> = (0..2u32)
        .map(|id| {
            let mut engine = board.engine(id);
            let mut cpu = first.cpu.clone();
            cpu.id = id;
            std::thread::spawn(move || engine.run(&mut cpu))
        })
        .collect();
    for thread in threads {
        assert!(matches!(thread.join().unwrap(), em::Exit::Halt));
    }
    for place in places {
        let mut bytes = [0; 4];
        board.ram.read(place, &mut bytes);
        assert_eq!(u64::from(u32::from_le_bytes(bytes)), 2 * COUNT, "{place:#x}");
    }
}

#[test]
fn a_repeated_move_stops_at_the_faulting_page_and_can_be_resumed() {
    let mut m = small(P | W, |a| {
        a.mov(rsi, 0x3_0000u64)?;
        a.mov(rdi, PAGE + 0x800)?;
        a.mov(ecx, 0x1000)?;
        a.rep().movsb()?;
        a.hlt()
    });
    let pattern: Vec<u8> = (0..0x1000u32).map(|i| (i * 7) as u8).collect();
    m.put(0x3_0000, &pattern);
    m.put(PTE + 8, &[0; 8]);
    assert_eq!((page_fault(&mut m), m.cpu.cr2), (2, PAGE + 0x1000));
    assert_eq!((m.cpu.gpr[1], m.cpu.gpr[6], m.cpu.gpr[7]), (0x800, 0x3_0800, PAGE + 0x1000));
    let rip = m.u64_at(m.cpu.gpr[4] + 8);
    m.put(PTE + 8, &((FRAME + 0x1000) | P | W).to_le_bytes());
    m.cpu.rip = rip;
    m.run_to_halt();
    assert_eq!(m.bytes::<0x1000>(FRAME + 0x800).to_vec(), pattern);
    assert_eq!(m.cpu.gpr[1], 0);
}

#[test]
fn overlapping_and_backward_moves_go_element_by_element() {
    let mut m = long(|a| {
        a.mov(rsi, FRAME)?;
        a.mov(rdi, FRAME + 1)?;
        a.mov(ecx, 100)?;
        a.rep().movsb()?;
        a.mov(rsi, FRAME + 0x1000 + 99)?;
        a.mov(rdi, FRAME + 0x1000 + 100)?;
        a.mov(ecx, 100)?;
        a.std()?;
        a.rep().movsb()?;
        a.hlt()
    });
    m.put(FRAME, &[9]);
    let numbers: [u8; 100] = std::array::from_fn(|i| i as u8);
    m.put(FRAME + 0x1000, &numbers);
    m.run_to_halt();
    assert_eq!(m.bytes::<101>(FRAME), [9; 101]);
    assert_eq!(m.bytes::<100>(FRAME + 0x1001), numbers);
}

#[test]
fn scans_and_compares_stop_at_the_difference() {
    let mut m = long(|a| {
        a.mov(rdi, FRAME)?;
        a.mov(ecx, 0x3000)?;
        a.xor(eax, eax)?;
        a.repne().scasb()?;
        a.mov(rbx, rcx)?;
        a.mov(rsi, FRAME)?;
        a.mov(rdi, FRAME + 0x4000)?;
        a.mov(ecx, 0x1000)?;
        a.repe().cmpsd()?;
        a.hlt()
    });
    m.put(FRAME, &[1; 0x8000]);
    m.put(FRAME + 0x1234, &[0]);
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[3], 0x3000 - 0x1235);
    assert_eq!(m.cpu.gpr[1], 0x1000 - 0x1234 / 4 - 1);
    assert!(m.flag(rflags::CF) && !m.flag(rflags::ZF));
}

#[test]
fn stores_to_rom_are_lost_and_open_bus_reads_ones() {
    let mut m = long(|a| {
        a.mov(edi, 0x80_0000)?; // past the RAM
        a.mov(dword_ptr(rdi), 5)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.hlt()
    });
    m.run_to_halt();
    assert_eq!(m.cpu.gpr[0], 0xffff_ffff);
}

#[test]
fn non_canonical_addresses_fault_by_segment() {
    let mut m = long(|a| {
        a.mov(rax, 0x8000_0000_0000_0000u64)?;
        a.mov(ebx, dword_ptr(rax))
    });
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 13);
    let mut m = long(|a| {
        a.mov(rbp, 0x8000_0000_0000_0000u64)?;
        a.mov(ebx, dword_ptr(rbp))
    });
    m.run_to_halt();
    assert_eq!(m.halted_in_handler(), 12);
}

#[test]
fn segment_limits_hold_in_real_and_protected_mode() {
    let mut m = Machine::real(0x1000);
    let code = assemble(16, 0x1000, |a| {
        a.mov(bx, 0xffff)?;
        a.mov(ax, word_ptr(bx))
    });
    m.put(0x1000, &code);
    m.put(13 * 4, &[0, 0x20, 0, 0]);
    m.put(0x2000, &[0xf4]);
    m.run_to_halt();
    assert_eq!((m.cpu.rip, m.cpu.gpr[4]), (0x2001, 0x7ffa));
    // Expand-down: offsets above the limit are valid.
    let mut m = Machine::protected(CODE as u32);
    m.tables();
    let code = assemble(32, CODE, |a| {
        a.mov(eax, 0x33)?;
        a.mov(ds, eax)?;
        a.mov(ebx, dword_ptr(0x2000))?;
        a.mov(ecx, dword_ptr(0xfff))
    });
    m.put(CODE, &code);
    m.put(GDT + 0x30, &descriptor(0, 0xfff, 0xf7, 4).to_le_bytes());
    m.put(0x2000, &[7]);
    m.run_to_halt();
    assert_eq!((m.halted_in_handler(), m.cpu.gpr[3] & 0xff), (13, 7));
}

#[test]
fn pae_and_32_bit_paging_translate() {
    for pae in [false, true] {
        let mut m = Machine::protected(CODE as u32);
        m.tables();
        let code = assemble(32, CODE, |a| {
            a.mov(eax, TABLES as i32)?;
            a.mov(cr3, eax)?;
            a.mov(eax, if pae { 0x20 } else { 0x10 })?;
            a.mov(cr4, eax)?;
            a.mov(eax, cr0)?;
            a.or(eax, 1 << 31)?;
            a.mov(cr0, eax)?;
            a.mov(ebx, dword_ptr(PAGE + 0x10))?;
            a.mov(dword_ptr(PAGE + 0x14), ebx)?;
            a.mov(ecx, dword_ptr(PAGE + 0x1000))
        });
        m.put(CODE, &code);
        if pae {
            // Two directories: identity for the first GiB, small pages for the second.
            m.put(TABLES, &((TABLES + 0x1000) | 1).to_le_bytes());
            m.put(TABLES + 8, &((TABLES + 0x2000) | 1).to_le_bytes());
            m.put(TABLES + 0x1000, &0x83u64.to_le_bytes());
            m.put(TABLES + 0x2000, &(PTE | 3).to_le_bytes());
            m.put(PTE, &(FRAME | 3).to_le_bytes());
        } else {
            m.put(TABLES, &0x83u32.to_le_bytes());
            m.put(TABLES + 4 * (PAGE >> 22), &(PTE as u32 | 3).to_le_bytes());
            m.put(PTE, &(FRAME as u32 | 3).to_le_bytes());
        }
        m.put(FRAME + 0x10, &0xabcdu32.to_le_bytes());
        m.run_to_halt();
        assert_eq!((m.halted_in_handler(), m.u32_at(m.cpu.gpr[4])), (14, 0), "PAE {pae}");
        assert_eq!((m.cpu.gpr[3], m.u32_at(FRAME + 0x14)), (0xabcd, 0xabcd));
        assert_eq!(m.u32_at(PTE) & 0x60, 0x60);
    }
}

#[test]
fn strings_are_moved_downwards_element_by_element() {
    // The last bytes of source and destination, the number of elements and their size: apart, on pages of their own, overlapping so
    // that memmove would do, overlapping so that the top is repeated, and not aligned.
    for (from, to, count, size) in [
        (0x10_2345u64, 0x11_6789u64, 9000usize, 1usize),
        (0x10_2ff8, 0x11_5ff8, 1500, 8),
        (0x10_3000, 0x10_3009, 5000, 1),
        (0x10_3009, 0x10_3000, 5000, 1),
        (0x10_3004, 0x10_3000, 2000, 4),
        (0x10_3ffd, 0x11_2ffb, 1200, 4),
        (0x10_3ff9, 0x11_2001, 700, 2),
    ] {
        let mut m = long(|a| {
            a.mov(rsi, from)?;
            a.mov(rdi, to)?;
            a.mov(ecx, count as u32)?;
            a.std()?;
            match size {
                1 => a.rep().movsb()?,
                2 => a.rep().movsw()?,
                4 => a.rep().movsd()?,
                _ => a.rep().movsq()?,
            }
            a.hlt()
        });
        const BASE: u64 = 0xf_0000;
        let mut expected: Vec<u8> =
            (0..0x4_0000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        m.put(BASE, &expected);
        for n in 0..count {
            let at = |last: u64| (last - BASE) as usize - n * size;
            expected.copy_within(at(from)..at(from) + size, at(to));
        }
        m.run_to_halt();
        assert_eq!(m.cpu.gpr[1], 0);
        assert_eq!(m.cpu.gpr[6], from - (count * size) as u64);
        assert_eq!(m.cpu.gpr[7], to - (count * size) as u64);
        let mut found = vec![0; expected.len()];
        m.board.ram.read(BASE, &mut found);
        let at = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(at, None, "{from:#x} to {to:#x}, {count} of {size}");
    }
}
