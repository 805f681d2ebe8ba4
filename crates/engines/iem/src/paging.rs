//! The page-table walker: linear to physical addresses by 32-bit, PAE and 4-level paging (Intel SDM volume 3, chapter 4).
//!
//! It reads and updates tables through [`PhysMemory`], so that every engine can use it.

use cpum::CpuState;
use cpum::state::{cr0, cr4, efer, rflags};

/// Page-fault error code bits.
pub mod code {
    pub const PRESENT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const USER: u16 = 4;
    pub const RESERVED: u16 = 8;
    pub const FETCH: u16 = 16;
}

/// Page-table entry bits.
pub mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// Page size, in directory entries.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// Access to page tables in guest physical memory.
pub trait PhysMemory {
    fn read_u32(&mut self, address: u64) -> u32;
    fn read_u64(&mut self, address: u64) -> u64;
    /// Sets `bits` in an entry of 4 (`wide` false) or 8 bytes, atomically, if it still holds `old`; false if it does not.
    fn set_bits(&mut self, address: u64, wide: bool, old: u64, bits: u64) -> bool;
}

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Fetch,
}

/// An access, for its permission check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub kind: Kind,
    /// Made at CPL 3, and not to a system table.
    pub user: bool,
    /// Supervisor access to user pages is allowed (RFLAGS.AC at an explicit access).
    pub smap_override: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub physical: u64,
    pub global: bool,
}

/// The highest physical address width that page tables may use here.
pub const MAX_PHYS_BITS: u32 = 52;

/// What the walk depends on besides memory.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Physical-address width told by CPUID.
    pub phys_bits: u32,
    /// 1 GiB pages exist.
    pub huge: bool,
}

impl Limits {
    fn reserved(self) -> u64 {
        let bits = self.phys_bits.clamp(32, MAX_PHYS_BITS);
        (1 << MAX_PHYS_BITS) - (1u64 << bits)
    }
}

/// Address bits of an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

struct Walk<'a, M> {
    mem: &'a mut M,
    access: Access,
    nxe: bool,
    reserved: u64,
    /// Permissions common to all levels so far.
    writable: bool,
    user: bool,
    nx: bool,
}

enum Outcome {
    Done(Translation),
    /// The entry changed under us.
    Again,
}

/// Translates `linear` for `access`, setting accessed and dirty bits, or gives the page fault's error code. Paging must be on.
pub fn translate<M: PhysMemory>(
    mem: &mut M,
    cpu: &CpuState,
    limits: Limits,
    linear: u64,
    access: Access,
) -> Result<Translation, u16> {
    loop {
        let walk = Walk {
            mem: &mut *mem,
            access,
            nxe: cpu.msr.efer & efer::NXE != 0,
            reserved: limits.reserved(),
            writable: true,
            user: true,
            nx: false,
        };
        let outcome = if cpu.cr4 & cr4::PAE == 0 {
            walk.legacy(cpu, linear, limits)
        } else if cpu.msr.efer & efer::LMA == 0 {
            walk.pae(cpu, linear)
        } else {
            walk.long(cpu, linear, limits)
        };
        match outcome {
            Ok(Outcome::Done(t)) => return Ok(t),
            Ok(Outcome::Again) => {}
            Err(bits) => {
                let mut error = bits;
                if access.kind == Kind::Write {
                    error |= code::WRITE;
                }
                if access.user {
                    error |= code::USER;
                }
                let nx_on = cpu.cr4 & cr4::PAE != 0 && cpu.msr.efer & efer::NXE != 0;
                if access.kind == Kind::Fetch && (nx_on || cpu.cr4 & cr4::SMEP != 0) {
                    error |= code::FETCH;
                }
                return Err(error);
            }
        }
    }
}

/// Whether supervisor accesses may touch user pages now, for [`Access::smap_override`].
pub fn smap_override(cpu: &CpuState) -> bool {
    cpu.cr4 & cr4::SMAP == 0 || cpu.rflags & rflags::AC != 0
}

impl<M: PhysMemory> Walk<'_, M> {
    /// Checks an 8-byte entry and takes its permissions.
    fn enter(&mut self, entry: u64, extra_reserved: u64) -> Result<(), u16> {
        if entry & pte::P == 0 {
            return Err(0);
        }
        if entry & (self.reserved | extra_reserved) != 0 || entry & pte::NX != 0 && !self.nxe {
            return Err(code::PRESENT | code::RESERVED);
        }
        self.writable &= entry & pte::W != 0;
        self.user &= entry & pte::U != 0;
        self.nx |= entry & pte::NX != 0;
        Ok(())
    }

    /// Marks a table entry accessed; false if it changed meanwhile.
    fn touch(&mut self, address: u64, wide: bool, entry: u64) -> bool {
        entry & pte::A != 0 || self.mem.set_bits(address, wide, entry, pte::A)
    }

    /// Checks the collected permissions and finishes with the leaf entry at `address`.
    fn leaf(
        self,
        cpu: &CpuState,
        address: u64,
        wide: bool,
        entry: u64,
        physical: u64,
    ) -> Result<Outcome, u16> {
        let access = self.access;
        let allowed = if access.user {
            self.user
                && match access.kind {
                    Kind::Read => true,
                    Kind::Write => self.writable,
                    Kind::Fetch => !self.nx,
                }
        } else {
            match access.kind {
                Kind::Read => !self.user || access.smap_override || cpu.cr4 & cr4::SMAP == 0,
                Kind::Write => {
                    (self.writable || cpu.cr0 & cr0::WP == 0)
                        && (!self.user || access.smap_override || cpu.cr4 & cr4::SMAP == 0)
                }
                Kind::Fetch => !(self.nx || (self.user && cpu.cr4 & cr4::SMEP != 0)),
            }
        };
        if !allowed {
            return Err(code::PRESENT);
        }
        let wanted = if access.kind == Kind::Write { pte::A | pte::D } else { pte::A };
        if entry & wanted != wanted && !self.mem.set_bits(address, wide, entry, wanted) {
            return Ok(Outcome::Again);
        }
        Ok(Outcome::Done(Translation { physical, global: entry & pte::G != 0 && cpu.cr4 & cr4::PGE != 0 }))
    }

    fn legacy(mut self, cpu: &CpuState, linear: u64, limits: Limits) -> Result<Outcome, u16> {
        let pde_at = cpu.cr3 & 0xffff_f000 | (linear >> 22 & 0x3ff) << 2;
        let pde = u64::from(self.mem.read_u32(pde_at));
        if pde & pte::P == 0 {
            return Err(0);
        }
        self.writable = pde & pte::W != 0;
        self.user = pde & pte::U != 0;
        if pde & pte::PS != 0 && cpu.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 13 to 20 are address bits 32 to 39; bit 21 is reserved.
            let high = (pde >> 13 & 0xff) << 32;
            if pde & 1 << 21 != 0 || high & limits.reserved() != 0 {
                return Err(code::PRESENT | code::RESERVED);
            }
            let physical = high | pde & 0xffc0_0000 | linear & 0x003f_ffff;
            return self.leaf(cpu, pde_at, false, pde, physical);
        }
        if !self.touch(pde_at, false, pde) {
            return Ok(Outcome::Again);
        }
        let pte_at = pde & 0xffff_f000 | (linear >> 12 & 0x3ff) << 2;
        let entry = u64::from(self.mem.read_u32(pte_at));
        if entry & pte::P == 0 {
            return Err(0);
        }
        self.writable &= entry & pte::W != 0;
        self.user &= entry & pte::U != 0;
        let physical = entry & 0xffff_f000 | linear & 0xfff;
        self.leaf(cpu, pte_at, false, entry, physical)
    }

    fn pae(mut self, cpu: &CpuState, linear: u64) -> Result<Outcome, u16> {
        // Bits 52 to 62 are reserved outside long mode.
        self.reserved |= 0x7ff << MAX_PHYS_BITS;
        let pdpte = cpu.pdpte[(linear >> 30 & 3) as usize];
        if pdpte & pte::P == 0 {
            return Err(0);
        }
        self.directory(cpu, linear, pdpte & ADDRESS)
    }

    fn long(mut self, cpu: &CpuState, linear: u64, limits: Limits) -> Result<Outcome, u16> {
        let pml4e_at = cpu.cr3 & ADDRESS | (linear >> 39 & 0x1ff) << 3;
        let pml4e = self.mem.read_u64(pml4e_at);
        self.enter(pml4e, pte::PS)?;
        let pdpte_at = pml4e & ADDRESS | (linear >> 30 & 0x1ff) << 3;
        let pdpte = self.mem.read_u64(pdpte_at);
        if pdpte & pte::PS != 0 && limits.huge {
            self.enter(pdpte, 0x3fff_e000)?;
        } else {
            self.enter(pdpte, pte::PS)?;
        }
        if !self.touch(pml4e_at, true, pml4e) {
            return Ok(Outcome::Again);
        }
        if pdpte & pte::PS != 0 {
            let physical = pdpte & ADDRESS & !0x3fff_ffff | linear & 0x3fff_ffff;
            return self.leaf(cpu, pdpte_at, true, pdpte, physical);
        }
        if !self.touch(pdpte_at, true, pdpte) {
            return Ok(Outcome::Again);
        }
        self.directory(cpu, linear, pdpte & ADDRESS)
    }

    /// The two lowest levels of PAE and 4-level paging.
    fn directory(mut self, cpu: &CpuState, linear: u64, table: u64) -> Result<Outcome, u16> {
        let pde_at = table | (linear >> 21 & 0x1ff) << 3;
        let pde = self.mem.read_u64(pde_at);
        if pde & pte::PS != 0 {
            self.enter(pde, 0x001f_e000)?;
            let physical = pde & ADDRESS & !0x001f_ffff | linear & 0x001f_ffff;
            return self.leaf(cpu, pde_at, true, pde, physical);
        }
        self.enter(pde, 0)?;
        if !self.touch(pde_at, true, pde) {
            return Ok(Outcome::Again);
        }
        let pte_at = pde & ADDRESS | (linear >> 12 & 0x1ff) << 3;
        let entry = self.mem.read_u64(pte_at);
        self.enter(entry, 0)?;
        let physical = entry & ADDRESS | linear & 0xfff;
        self.leaf(cpu, pte_at, true, entry, physical)
    }
}
