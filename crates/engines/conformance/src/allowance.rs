//! What may differ under KVM, and why.
//!
//! Everything else is compared. Allowances for QEMU's CPU emulator (TCG) hold only where the host's CPU says that it is one (CPUID leaf
//! 0x40000000): the heavy test runs KVM on an AMD-V which that emulates, and what differs there is TCG's doing, neither KVM's nor ours. Each
//! names its place in QEMU 7.2's `target/i386/tcg`.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess};

use crate::Kind;
use crate::stream::Mode;
use crate::stream::compare::{Record, records};
use crate::stream::guest::Outcome;
use crate::stream::program::Assembled;

/// What is made allowance for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// The counter is the host's, not the board's clock: programs throw away what RDTSC and RDTSCP give, and leave the MSR alone. And in real
    /// mode CS keeps the type that it had: nothing looks at it there. KVM's emulator, which does accesses to device registers, goes without the
    /// page tables where it has just looked that page up (`vcpu_mmio_gva_to_gpa`), and so may leave its entry clean.
    pub kvm: bool,
    /// The host's CPU is TCG's.
    pub tcg: bool,
}

/// The kind of a write to a device register in memory, without its width.
const MMIO_WRITE: u8 = 0x30;

/// Bytes of the operands that have to be aligned.
const VECTOR: usize = 16;

/// Exceptions' vectors.
const DEBUG: u8 = 1;
const STACK: u8 = 12;
const PROTECTION: u8 = 13;
const PAGE: u8 = 14;
const ALIGNMENT: u8 = 17;

impl Allowance {
    /// For these engines on this host.
    pub fn of(engines: &[Kind]) -> Self {
        let kvm = engines.contains(&Kind::Kvm);
        Self { kvm, tcg: kvm && nem_kvm::on_emulated_cpu() }
    }

    /// Whether programs may have VEX instructions in code of this width. TCG takes their first byte for LES or LDS in 16-bit code of protected
    /// mode, and raises #UD (`disas_insn`; mended in January 2026: it asks for protected mode now, not for 32-bit code).
    pub fn vex(self, bits: u32) -> bool {
        !(self.tcg && bits == 16)
    }

    /// Whether programs may have this form. What an instruction computes is the CPU's business, not KVM's or the engine's, and TCG is no
    /// measure of it: among what differed were #XM (never raised), the exponents of the x87 registers behind MMX, the upper half behind MOVBE with
    /// 16 bits, reserved flags behind CMPXCHG8B, the order of CMPS's operands, INT1 and the second encoding of TEST with an immediate (#UD). On
    /// TCG programs therefore consist of what it does as the manuals say, for its exits, faults and state: moves, integer arithmetic, strings,
    /// moves and logic of vectors.
    pub fn form(self, code: Code) -> bool {
        use Mnemonic::*;
        if !self.tcg {
            return true;
        }
        let second = matches!(
            code,
            Code::Test_rm8_imm8_F6r1
                | Code::Test_rm16_imm16_F7r1
                | Code::Test_rm32_imm32_F7r1
                | Code::Test_rm64_imm32_F7r1
        );
        !second
            && matches!(
                code.mnemonic(),
                Mov | Movzx
                    | Movsx
                    | Movsxd
                    | Lea
                    | Xchg
                    | Xadd
                    | Cmpxchg
                    | Add
                    | Sub
                    | And
                    | Or
                    | Xor
                    | Not
                    | Neg
                    | Inc
                    | Dec
                    | Cmp
                    | Test
                    | Mul
                    | Imul
                    | Cbw
                    | Cwde
                    | Cdqe
                    | Cwd
                    | Cdq
                    | Cqo
                    | Movsb
                    | Movsw
                    | Movsd
                    | Movsq
                    | Stosb
                    | Stosw
                    | Stosd
                    | Stosq
                    | Lodsb
                    | Lodsw
                    | Lodsd
                    | Lodsq
                    | Scasb
                    | Scasw
                    | Scasd
                    | Scasq
                    | Sete
                    | Setne
                    | Setb
                    | Setae
                    | Cmove
                    | Cmovne
                    | Cmovb
                    | Cmovae
                    | Bt
                    | Nop
                    | Lahf
                    | Sahf
                    | Xlatb
                    | Rdtsc
                    | Rdtscp
                    | Movups
                    | Movdqu
                    | Movaps
                    | Movdqa
                    | Movd
                    | Movq
                    | Pxor
                    | Por
                    | Pand
                    | Pandn
                    | Paddb
                    | Paddd
                    | Psubb
                    | Pcmpeqb
                    | Pcmpeqd
                    | Xorps
                    | Andps
                    | Orps
                    | Vmovups
                    | Vmovdqu
                    | Vmovaps
                    | Vmovdqa
                    | Vpxor
                    | Vpor
                    | Vpand
                    | Vpaddd
                    | Vxorps
                    | Fild
                    | Fld
            )
    }

    /// Whether programs can be run in this mode. TCG sets the accessed bit in the entries of PAE's first level, where it is reserved
    /// (`mmu_translate`, level 3 without long mode); KVM, which reads them again, then refuses to emulate anything there.
    pub fn mode(self, mode: Mode) -> bool {
        !(self.tcg && mode == Mode::User32)
    }

    /// Whether programs may change instructions that follow soon. TCG was seen to go on with what it had translated.
    pub fn patches(self) -> bool {
        !self.tcg
    }

    /// Whether programs may have LOCK. TCG has begun to change the flags when its operand faults, and a single step's trap comes an instruction
    /// late (`cpu_exec_step_atomic`).
    pub fn locks(self) -> bool {
        !self.tcg
    }

    /// Whether programs may read CR5. TCG looks at the privilege first and at the number later.
    pub fn control_5(self) -> bool {
        !self.tcg
    }

    /// Whether programs may have MMX instructions. See [`Allowance::form`].
    pub fn mmx(self) -> bool {
        !self.tcg
    }

    /// Whether programs may unmask exceptions of the floating-point units. See [`Allowance::form`].
    pub fn unmasks(self) -> bool {
        !self.tcg
    }

    /// Groups in a program: few where many programs are of no use ([`Allowance::excuse`]).
    pub fn groups(self) -> usize {
        if self.tcg { 4 } else { 14 }
    }

    /// Which bits of the flags that an exception pushed count. TCG pushes them as they stand, without the resume flag that faults set
    /// (`do_interrupt_protected` and `do_interrupt64` push `cpu_compute_eflags`); faults that KVM raises have it.
    pub fn pushed_flags(self) -> u32 {
        if self.tcg { !(cpum::state::rflags::RF as u32) } else { !0 }
    }

    /// Which bits of an exception's error code count. An operand that is read and written faults as a read in TCG, which does the one after
    /// the other.
    pub fn error_code(self, record: &Record<'_>, assembled: &Assembled) -> u32 {
        const WRITE: u32 = 2;
        let updates = || assembled.at(record.ip()).is_some_and(updates);
        if self.tcg && record.vector() == PAGE && updates() { !WRITE } else { !0 }
    }

    /// Whether the stack segment counts at the end. TCG gives an interrupt that comes by the interrupt stack table a null one even if the
    /// privilege level stays (`do_interrupt64`).
    pub fn stack_segment(self, mode: Mode) -> bool {
        !(self.tcg && mode == Mode::Kernel64)
    }

    /// Why this case need not end alike, if KVM or the CPU that it has lacks what it ran into: then it goes on where it should have stopped.
    pub fn excuse(self, mode: Mode, assembled: &Assembled, oracle: &Outcome) -> Option<&'static str> {
        let writes_register = || oracle.accesses.iter().any(|(kind, ..)| kind & 0xf0 == MMIO_WRITE);
        if self.kvm && writes_register() && records(mode, &oracle.log).any(|r| r.vector() == DEBUG) {
            // KVM's emulator forgets the trap where it leaves for a write (`x86_emulate_instruction`: it asks for one only if it stays).
            return Some("single steps over writes to device registers");
        }
        if !self.tcg {
            return None;
        }
        records(mode, &oracle.log).find_map(|record| {
            let insn = assembled.at(record.ip());
            let memory =
                insn.is_some_and(|insn| !InstructionInfoFactory::new().info(insn).used_memory().is_empty());
            let size = insn.map_or(0, |insn| insn.memory_size().size());
            match record.vector() {
                ALIGNMENT => Some("alignment checks"),
                STACK | PROTECTION if record.error() != Some(0) && mode != Mode::Real => None,
                STACK | PROTECTION if memory && mode.bits() != 64 => Some("limits and types of segments"),
                PAGE if insn.is_some_and(updates) && record.crosses(size) => {
                    Some("operands that are read and written in two pages")
                }
                PROTECTION if size >= VECTOR => Some("alignment of vectors"),
                _ => None,
            }
        })
    }
}

/// Whether the instruction reads its operand in memory and writes it.
fn updates(insn: &Instruction) -> bool {
    let both = [OpAccess::ReadWrite, OpAccess::ReadCondWrite, OpAccess::CondWrite];
    InstructionInfoFactory::new().info(insn).used_memory().iter().any(|m| both.contains(&m.access()))
}
