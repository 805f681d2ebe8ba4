//! Feature flags by the manuals' names (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E).

use super::{FeatureBit, OutputRegister};

const fn new(leaf: u32, subleaf: u32, register: OutputRegister, bit: u32) -> FeatureBit {
    FeatureBit { leaf, subleaf, register, bit }
}

macro_rules! bits {
    ($($leaf:literal, $subleaf:literal, $register:ident { $($name:ident = $bit:literal),* $(,)? })*) => {
        $($(pub const $name: FeatureBit = new($leaf, $subleaf, OutputRegister::$register, $bit);)*)*
    };
}

bits! {
    1, 0, Edx {
        FPU = 0, VME = 1, DE = 2, PSE = 3, TSC = 4, MSR = 5, PAE = 6, MCE = 7, CX8 = 8, APIC = 9, SEP = 11, MTRR = 12, PGE = 13,
        MCA = 14, CMOV = 15, PAT = 16, PSE36 = 17, CLFSH = 19, MMX = 23, FXSR = 24, SSE = 25, SSE2 = 26, HTT = 28,
    }
    1, 0, Ecx {
        SSE3 = 0, PCLMULQDQ = 1, MONITOR = 3, VMX = 5, SSSE3 = 9, FMA = 12, CX16 = 13, PCID = 17, SSE41 = 19, SSE42 = 20, X2APIC = 21,
        MOVBE = 22, POPCNT = 23, TSC_DEADLINE = 24, AES = 25, XSAVE = 26, OSXSAVE = 27, AVX = 28, F16C = 29, RDRAND = 30,
        HYPERVISOR = 31,
    }
    7, 0, Ebx {
        FSGSBASE = 0, TSC_ADJUST = 1, BMI1 = 3, AVX2 = 5, FDP_EXCPTN_ONLY = 6, SMEP = 7, BMI2 = 8, ERMS = 9, INVPCID = 10,
        NO_FCS_FDS = 13, RDSEED = 18, ADX = 19, SMAP = 20, CLFLUSHOPT = 23, CLWB = 24, SHA = 29,
    }
    7, 0, Ecx { UMIP = 2, GFNI = 8, VAES = 9, VPCLMULQDQ = 10, RDPID = 22 }
    7, 0, Edx { FSRM = 4, ARCH_CAPABILITIES = 29 }
    7, 1, Eax { AVX_VNNI = 4 }
    0xd, 1, Eax { XSAVEOPT = 0, XSAVEC = 1, XGETBV1 = 2 }
    0x8000_0001, 0, Edx { SYSCALL = 11, NX = 20, MMXEXT = 22, PAGE1GB = 26, RDTSCP = 27, LM = 29 }
    0x8000_0001, 0, Ecx {
        LAHF64 = 0, CMP_LEGACY = 1, SVM = 2, CR8_LEGACY = 4, LZCNT = 5, SSE4A = 6, PREFETCHW = 8, TOPOEXT = 22,
    }
    0x8000_0007, 0, Edx { INVARIANT_TSC = 8 }
    0x8000_0008, 0, Ebx { CLZERO = 0, XSAVEERPTR = 2, WBNOINVD = 9 }
}
