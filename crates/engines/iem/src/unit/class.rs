//! Which instructions belong to the unit, and what must hold before they run.

use std::sync::OnceLock;

use cpum::CpuState;
use cpum::cpuid::{CpuidTable, FeatureBit, bit};
use cpum::state::{cr0, cr4};
use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
};

use super::{task_switched, x87};
use crate::Fault;

/// The family of an instruction, which decides the checks before it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// x87, waits for pending exceptions.
    X87,
    /// x87 control that does not wait (FNINIT, FNSTSW …).
    X87NoWait,
    /// WAIT/FWAIT.
    Wait,
    Mmx,
    /// SSE to SSE4.2, AES and relatives in legacy encoding.
    Sse,
    /// Anything VEX-encoded.
    Avx,
    /// FXSAVE, FXRSTOR.
    Fxsave,
    /// XSAVE and its variants, XRSTOR.
    Xsave,
}

/// How the caller has an instruction executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `Unit::execute` with the operand's bytes.
    Operand,
    /// `Unit::execute_memory`.
    Memory,
}

/// What the instruction does with its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    None,
    Read,
    Write,
    ReadWrite,
}

impl Access {
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }

    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }
}

/// What the caller needs to know about an instruction of the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    pub kind: Kind,
    pub route: Route,
    pub access: Access,
    /// Bytes of the memory operand; zero without one, and for [`Route::Memory`].
    pub size: u16,
    /// The operand's linear address must be a multiple of this, else #GP(0). One: no such rule.
    pub align: u16,
    /// It reads or writes arithmetic flags in `CpuState::rflags` (COMISS, PTEST, FCMOV …).
    pub flags: bool,
    /// CPUID features without which the instruction is #UD.
    pub features: Features,
    /// The host's make executes it before it looks at where the result goes: if the store faults, the x87 stack's top and MXCSR
    /// stay as the instruction left them, and its own exceptions come first.
    pub store_last: bool,
    /// Of [`Kind::Mmx`]: it uses XMM registers too, so CR4.OSFXSR must be set (SDM volume 3, 13.1.4).
    with_xmm: bool,
}

impl Class {
    /// Raises #UD, #NM and #MF as the state of CR0, CR4, XCR0 and the x87 status demands, in the architecture's order (Intel
    /// SDM volume 2, 2.4 and 2.7; volume 3, tables 13-1 and 2-2), before any memory access. #MF means FERR# where CR0.NE is clear.
    pub fn check(&self, cpu: &CpuState) -> Result<(), Fault> {
        match self.kind {
            Kind::Sse => {
                if cpu.cr0 & cr0::EM != 0 || cpu.cr4 & cr4::OSFXSR == 0 {
                    return Err(Fault::UD);
                }
                task_switched(cpu)
            }
            Kind::X87 => {
                if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
                    return Err(Fault::NM);
                }
                x87::pending(&cpu.xsave)
            }
            Kind::X87NoWait => {
                if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
                    return Err(Fault::NM);
                }
                Ok(())
            }
            Kind::Wait => {
                if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
                    return Err(Fault::NM);
                }
                x87::pending(&cpu.xsave)
            }
            Kind::Mmx => {
                if cpu.cr0 & cr0::EM != 0 || (self.with_xmm && cpu.cr4 & cr4::OSFXSR == 0) {
                    return Err(Fault::UD);
                }
                task_switched(cpu)?;
                x87::pending(&cpu.xsave)
            }
            Kind::Avx => {
                if cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & 6 != 6 || !cpu.is_protected() {
                    return Err(Fault::UD);
                }
                task_switched(cpu)
            }
            Kind::Fxsave => {
                if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
                    return Err(Fault::NM);
                }
                Ok(())
            }
            Kind::Xsave => {
                if cpu.cr4 & cr4::OSXSAVE == 0 {
                    return Err(Fault::UD);
                }
                task_switched(cpu)
            }
        }
    }
}

/// A set of CPU features that instructions of the unit need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u32);

macro_rules! features {
    ($($name:ident = $index:literal, $iced:pat, $host:tt, $cpuid:expr;)*) => {
        impl Features {
            $(pub const $name: Self = Self(1 << $index);)*

            /// What the host's CPU and operating system offer.
            pub fn host() -> Self {
                static HOST: OnceLock<u32> = OnceLock::new();
                Self(*HOST.get_or_init(|| 0 $(| if std::is_x86_feature_detected!($host) { 1 << $index } else { 0 })*))
            }

            /// What CPUID tells the guest.
            pub fn announced(cpuid: &CpuidTable) -> Self {
                Self(0 $(| if cpuid.has($cpuid) { 1 << $index } else { 0 })*)
            }

            /// The CPUID flags of the features in the set.
            pub fn bits(self) -> Vec<FeatureBit> {
                let mut bits = Vec::new();
                $(if self.contains(Self::$name) {
                    bits.push($cpuid);
                })*
                bits
            }

            fn of(feature: CpuidFeature) -> Option<Self> {
                Some(match feature {
                    $($iced => Self::$name,)*
                    _ => return None,
                })
            }
        }
    };
}

features! {
    X87 = 0, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387, "fxsr", bit::FPU;
    CMOV = 1, CpuidFeature::CMOV, "fxsr", bit::CMOV;
    MMX = 2, CpuidFeature::MMX, "sse2", bit::MMX;
    FXSR = 3, CpuidFeature::FXSR, "fxsr", bit::FXSR;
    SSE = 4, CpuidFeature::SSE, "sse", bit::SSE;
    SSE2 = 5, CpuidFeature::SSE2, "sse2", bit::SSE2;
    SSE3 = 6, CpuidFeature::SSE3, "sse3", bit::SSE3;
    SSSE3 = 7, CpuidFeature::SSSE3, "ssse3", bit::SSSE3;
    SSE41 = 8, CpuidFeature::SSE4_1, "sse4.1", bit::SSE41;
    SSE42 = 9, CpuidFeature::SSE4_2, "sse4.2", bit::SSE42;
    SSE4A = 10, CpuidFeature::SSE4A, "sse4a", bit::SSE4A;
    AES = 11, CpuidFeature::AES, "aes", bit::AES;
    PCLMULQDQ = 12, CpuidFeature::PCLMULQDQ, "pclmulqdq", bit::PCLMULQDQ;
    SHA = 13, CpuidFeature::SHA, "sha", bit::SHA;
    GFNI = 14, CpuidFeature::GFNI, "gfni", bit::GFNI;
    AVX = 15, CpuidFeature::AVX, "avx", bit::AVX;
    AVX2 = 16, CpuidFeature::AVX2, "avx2", bit::AVX2;
    FMA = 17, CpuidFeature::FMA, "fma", bit::FMA;
    F16C = 18, CpuidFeature::F16C, "f16c", bit::F16C;
    VAES = 19, CpuidFeature::VAES, "vaes", bit::VAES;
    VPCLMULQDQ = 20, CpuidFeature::VPCLMULQDQ, "vpclmulqdq", bit::VPCLMULQDQ;
    AVX_VNNI = 21, CpuidFeature::AVX_VNNI, "avxvnni", bit::AVX_VNNI;
    XSAVE = 22, CpuidFeature::XSAVE, "fxsr", bit::XSAVE;
    XSAVEOPT = 23, CpuidFeature::XSAVEOPT, "fxsr", bit::XSAVEOPT;
    XSAVEC = 24, CpuidFeature::XSAVEC, "fxsr", bit::XSAVEC;
}

impl Features {
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// What is known of a `Code` before operands are looked at.
#[derive(Clone, Copy)]
struct Entry {
    kind: Kind,
    features: Features,
}

/// Tells whether the unit executes an instruction, and how. It does not look at what the CPU has: see [`Class::features`].
pub fn classify(insn: &Instruction) -> Option<Class> {
    static TABLE: OnceLock<Box<[Option<Entry>]>> = OnceLock::new();
    let table = TABLE.get_or_init(|| Code::values().map(entry).collect());
    let entry = table[insn.code() as usize]?;
    let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let mut kind = entry.kind;
    let mut with_xmm = false;
    if matches!(kind, Kind::Sse) {
        let mut info = InstructionInfoFactory::new();
        let used = info.info(insn).used_registers();
        let mm = used.iter().any(|r| r.register().is_mm());
        // CVTPI2PS and CVTPI2PD from memory leave the x87 registers alone, on Intel's CPUs, too, whatever SDM volume 2 says of the
        // former.
        if mm {
            kind = Kind::Mmx;
            with_xmm = used.iter().any(|r| r.register().is_xmm());
        }
    }
    let route = if kind == Kind::Xsave || is_elementwise(insn) { Route::Memory } else { Route::Operand };
    let (access, size) = if route == Route::Memory || !has_memory {
        (Access::None, 0)
    } else if matches!(insn.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64) {
        // Bytes that FXSAVE leaves alone must come back as they were.
        (Access::ReadWrite, 512)
    } else {
        (memory_access(insn, kind), insn.memory_size().size() as u16)
    };
    let align = if has_memory { alignment(insn, kind, size) } else { 1 };
    let flags = (insn.rflags_read() | insn.rflags_modified()) != 0;
    // MMX stores mark the registers as used, and conversions to halves raise their flags.
    let store_last =
        access == Access::Write && (kind == Kind::Mmx || insn.mnemonic() == Mnemonic::Vcvtps2ph) && !is_amd();
    Some(Class { kind, route, access, size, align, flags, features: entry.features, store_last, with_xmm })
}

/// The guest's CPU is of the host's make; where makes differ, the host's way is the right one.
pub(crate) fn is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| {
        let vendor = crate::features::host_cpuid(0, 0).ebx.to_le_bytes();
        vendor == *b"Auth" || vendor == *b"Hygo"
    })
}

fn memory_access(insn: &Instruction, kind: Kind) -> Access {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    let (mut reads, mut writes) = (false, false);
    for used in info.used_memory() {
        match used.access() {
            OpAccess::Read | OpAccess::CondRead => reads = true,
            OpAccess::Write => writes = true,
            OpAccess::CondWrite => (reads, writes) = (true, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (reads, writes) = (true, true),
            OpAccess::None | OpAccess::NoMemAccess => {}
        }
    }
    // An x87 store with an unmasked exception leaves memory as it is.
    reads |= writes && kind == Kind::X87;
    match (reads, writes) {
        (false, false) => Access::None,
        (true, false) => Access::Read,
        (false, true) => Access::Write,
        (true, true) => Access::ReadWrite,
    }
}

fn is_elementwise(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Maskmovq | Maskmovdqu | Vmaskmovdqu => true,
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => true,
        _ => insn.is_vsib(),
    }
}

fn alignment(insn: &Instruction, kind: Kind, size: u16) -> u16 {
    use Mnemonic::*;
    match (kind, insn.mnemonic()) {
        (Kind::Fxsave, _) => 16,
        (Kind::Xsave, _) => 64,
        (Kind::Sse, Movups | Movupd | Movdqu | Lddqu) => 1,
        (Kind::Sse, Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm) => 1,
        // Intel's raise #GP.
        (Kind::Sse, Sha1rnds4 | Sha1nexte | Sha1msg1 | Sha1msg2 | Sha256rnds2 | Sha256msg1 | Sha256msg2)
            if is_amd() =>
        {
            1
        }
        (Kind::Sse | Kind::Mmx, _) if size == 16 => 16,
        (Kind::Avx, Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa) => size,
        _ => 1,
    }
}

fn entry(code: Code) -> Option<Entry> {
    use Mnemonic::*;
    let op = code.op_code();
    let encoding = op.encoding();
    if !matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX) {
        return None;
    }
    if code == Code::Wait {
        return Some(Entry { kind: Kind::Wait, features: Features::default() });
    }
    match code.mnemonic() {
        // Plain integer or no operands: the interpreter's own.
        Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Sfence | Lfence | Mfence | Movnti | Crc32 => {
            return None;
        }
        Xsaves | Xsaves64 | Xrstors | Xrstors64 | Xgetbv | Xsetbv => return None,
        Fstdw | Fstsg | Fnstdw | Fnstsg | Frstpm => return None,
        _ => {}
    }
    let mut features = Features::default();
    for &feature in code.cpuid_features() {
        features.0 |= Features::of(feature)?.0;
    }
    if features == Features::CMOV || features == Features::default() {
        return None;
    }
    let kind = if encoding == EncodingKind::VEX {
        Kind::Avx
    } else if features.contains(Features::X87) {
        match code.mnemonic() {
            Fninit | Fnclex | Fnstsw | Fnstcw | Fnstenv | Fnsave | Fneni | Fndisi | Fnsetpm => {
                Kind::X87NoWait
            }
            _ => Kind::X87,
        }
    } else if features == Features::MMX {
        Kind::Mmx
    } else if features == Features::FXSR {
        Kind::Fxsave
    } else if features.intersection(Features(Features::XSAVE.0 | Features::XSAVEOPT.0 | Features::XSAVEC.0)).0
        != 0
    {
        Kind::Xsave
    } else {
        Kind::Sse
    };
    Some(Entry { kind, features })
}
