//! The architectural state of one virtual CPU. `repr(C)`, because generated code reaches fields by offset.

use bitfield_struct::bitfield;

/// Index of a general register in [`CpuState::gpr`], in the instruction encoding's order.
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
}

/// Index of a segment register in [`CpuState::seg`], in the instruction encoding's order.
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// RFLAGS bits (Intel SDM volume 1, 3.4.3).
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    /// Reads as one always.
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits (Intel SDM volume 3, 2.5).
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM volume 3, 2.5).
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits.
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// A segment register's attributes in the layout of descriptor bits 40–55 (VMX "access rights").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Descriptor {
    /// System or code/data type.
    #[bits(4)]
    pub kind: u8,
    /// S: set for code and data, clear for system segments.
    pub code_or_data: bool,
    #[bits(2)]
    pub dpl: u8,
    pub present: bool,
    #[bits(4)]
    _limit: u8,
    pub avl: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// D/B: 32-bit default size.
    pub big: bool,
    /// G: limit counts pages. Kept for saving; [`Segment::limit`] is in bytes always.
    pub granular: bool,
    /// The register holds a null selector; any use faults.
    pub unusable: bool,
    #[bits(15)]
    __: u16,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    /// Highest valid offset (expand-up), in bytes.
    pub limit: u32,
    pub attr: Descriptor,
    pub selector: u16,
}

impl Segment {
    /// A real-mode segment: base is 16 times the selector, limit 64 KiB.
    pub const fn real(selector: u16, kind: u8) -> Self {
        Self {
            base: (selector as u64) << 4,
            limit: 0xffff,
            attr: Descriptor::new().with_kind(kind).with_code_or_data(true).with_present(true),
            selector,
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u16,
}

/// What a vCPU does between instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Activity {
    Running = 0,
    /// After HLT: waits for an interrupt.
    Halted = 1,
    /// An application processor after reset or INIT: waits for a start-up IPI.
    WaitForSipi = 2,
    /// After a triple fault.
    Shutdown = 3,
}

/// The x87/SSE/AVX state in the XSAVE standard format (Intel SDM volume 1, 13.4): 512 bytes legacy area, 64 bytes
/// header, YMM high halves at 576. Aligned so that the host's own XSAVE/XRSTOR work on it directly: the header's XSTATE_BV always
/// names x87 and SSE, and AVX as soon as any of its registers was written; components it does not name hold their initial values.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XsaveArea::SIZE]);

impl XsaveArea {
    /// Room for x87, SSE and AVX.
    pub const SIZE: usize = 832;

    /// The state after reset or INIT: FCW 0x37f, MXCSR 0x1f80, all registers empty or zero.
    pub const fn reset() -> Self {
        let mut area = [0; Self::SIZE];
        area[0] = 0x7f;
        area[1] = 0x03;
        area[24] = 0x80;
        area[25] = 0x1f;
        area[512] = 3;
        Self(area)
    }
}

/// MSRs that hold state and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    /// IA32_APIC_BASE; the APIC follows it through the interrupt controller's contract.
    pub apic_base: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    /// Added to the VM's time-stamp counter (WRMSR to IA32_TIME_STAMP_COUNTER, IA32_TSC_ADJUST).
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
}

/// Everything the architecture defines for one logical processor.
#[derive(Clone)]
#[repr(C)]
pub struct CpuState {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// The PAE page-directory-pointer entries, loaded with CR3 (Intel SDM volume 3, 4.4.1).
    pub pdpte: [u64; 4],
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub xcr0: u64,
    pub msr: Msrs,
    pub activity: Activity,
    /// RIP up to which interrupts are held off by STI or MOV SS: they stay inhibited while `rip` equals it.
    pub inhibit_rip: Option<u64>,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// The vCPU's number, also its initial APIC id.
    pub id: u32,
    pub xsave: XsaveArea,
}

/// Type field of a writable, accessed data segment.
pub const DATA_RW: u8 = 3;
/// Type field of a readable, accessed code segment.
pub const CODE_RX: u8 = 11;

impl CpuState {
    /// The state after power-on or RESET (Intel SDM volume 3, table 9-1). Application processors wait for a SIPI.
    pub fn reset(id: u32) -> Self {
        let data = Segment::real(0, DATA_RW);
        let mut cs = Segment::real(0xf000, CODE_RX);
        cs.base = 0xffff_0000;
        let system = |kind| Segment {
            base: 0,
            limit: 0xffff,
            attr: Descriptor::new().with_kind(kind).with_present(true),
            selector: 0,
        };
        let bsp = id == 0;
        Self {
            gpr: [0, 0, 0x0000_0600, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            seg: [data, cs, data, data, data, data],
            ldtr: system(2),
            tr: system(11),
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdpte: [0; 4],
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            msr: Msrs {
                efer: 0,
                star: 0,
                lstar: 0,
                cstar: 0,
                sfmask: 0,
                kernel_gs_base: 0,
                tsc_aux: 0,
                sysenter_cs: 0,
                sysenter_esp: 0,
                sysenter_eip: 0,
                pat: 0x0007_0406_0007_0406,
                apic_base: 0xfee0_0800 | if bsp { 0x100 } else { 0 },
                misc_enable: 1,
                mtrr_def_type: 0,
                mtrr_fixed: [0; 11],
                mtrr_variable: [0; 16],
                tsc_offset: 0,
                tsc_adjust: 0,
            },
            activity: if bsp { Activity::Running } else { Activity::WaitForSipi },
            inhibit_rip: None,
            nmi_blocked: false,
            id,
            xsave: XsaveArea::reset(),
        }
    }

    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & cr0::PE == 0 {
            0
        } else if self.rflags & rflags::VM != 0 {
            3
        } else {
            self.seg[seg::SS].attr.dpl()
        }
    }

    /// Long mode with a 64-bit code segment.
    pub fn is_64bit(&self) -> bool {
        self.msr.efer & efer::LMA != 0 && self.seg[seg::CS].attr.long()
    }

    /// Protected mode without virtual-8086.
    pub fn is_protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.rflags & rflags::VM == 0
    }
}
