//! A vCPU's state to KVM and back.

use cpum::cpuid::bit;
use cpum::state::{TableRegister, XsaveArea, cr0, cr4, efer, rflags, seg};
use cpum::{CpuState, CpuidTable, Descriptor, Segment};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GUEST_MODE,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, Msrs, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_nested_state,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd};
use pgm::Pgm;
use vbox_types::GuestPhys;

/// XSTATE_BV in the XSAVE area: which components are not in their initial state.
const XSTATE_BV: usize = 512;
/// x87 and SSE; AVX.
const XSTATE_LEGACY: u64 = 3;
const XSTATE_ALL: u64 = 7;
/// IA32_FEATURE_CONTROL, and where an AMD CPU keeps its state during a virtual machine.
const FEATURE_CONTROL: u32 = 0x3a;
const VM_HSAVE_PA: u32 = 0xc001_0117;

fn segment(s: &Segment) -> kvm_segment {
    let granular = s.limit > 0xf_ffff || s.limit & 0xfff == 0xfff && s.attr.granular();
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.attr.kind(),
        present: s.attr.present().into(),
        dpl: s.attr.dpl(),
        db: s.attr.big().into(),
        s: s.attr.code_or_data().into(),
        l: s.attr.long().into(),
        g: granular.into(),
        avl: s.attr.avl().into(),
        unusable: (s.attr.unusable() || !s.attr.present()).into(),
        padding: 0,
    }
}

/// The task register. An emulated AMD-V wants the type that LTR finds in memory, without the busy bit, and else stops the whole emulated
/// host when a guest's exception changes to an inner privilege level in 32-bit mode (`get_ss_esp_from_tss` in QEMU: "invalid tss type").
/// AMD's CPUs have no use for the bit, and KVM shows it as set in any case.
fn task_register(s: &Segment) -> kvm_segment {
    const BUSY: u8 = 2;
    let mut tr = segment(s);
    if crate::on_emulated_cpu() {
        tr.type_ &= !BUSY;
    }
    tr
}

fn from_segment(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        attr: Descriptor::new()
            .with_kind(s.type_ & 15)
            .with_code_or_data(s.s != 0)
            .with_dpl(s.dpl & 3)
            .with_present(s.present != 0)
            .with_avl(s.avl != 0)
            .with_long(s.l != 0)
            .with_big(s.db != 0)
            .with_granular(s.g != 0)
            .with_unusable(s.unusable != 0),
    }
}

fn table(t: &TableRegister) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

fn sregs(cpu: &CpuState, cr8: u64) -> kvm_sregs {
    kvm_sregs {
        cs: segment(&cpu.seg[seg::CS]),
        ds: segment(&cpu.seg[seg::DS]),
        es: segment(&cpu.seg[seg::ES]),
        fs: segment(&cpu.seg[seg::FS]),
        gs: segment(&cpu.seg[seg::GS]),
        ss: segment(&cpu.seg[seg::SS]),
        tr: task_register(&cpu.tr),
        ldt: segment(&cpu.ldtr),
        gdt: table(&cpu.gdtr),
        idt: table(&cpu.idtr),
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        cr8,
        efer: cpu.msr.efer,
        apic_base: cpu.msr.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn take_sregs(cpu: &mut CpuState, s: &kvm_sregs) {
    cpu.seg[seg::CS] = from_segment(&s.cs);
    cpu.seg[seg::DS] = from_segment(&s.ds);
    cpu.seg[seg::ES] = from_segment(&s.es);
    cpu.seg[seg::FS] = from_segment(&s.fs);
    cpu.seg[seg::GS] = from_segment(&s.gs);
    cpu.seg[seg::SS] = from_segment(&s.ss);
    cpu.tr = from_segment(&s.tr);
    cpu.ldtr = from_segment(&s.ldt);
    cpu.gdtr = TableRegister { base: s.gdt.base, limit: s.gdt.limit };
    cpu.idtr = TableRegister { base: s.idt.base, limit: s.idt.limit };
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
    cpu.msr.efer = s.efer;
}

fn regs(cpu: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = cpu.gpr;
    let (rip, rflags) = (cpu.rip, cpu.rflags | rflags::FIXED);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn take_regs(cpu: &mut CpuState, regs: &kvm_regs) {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = *regs;
    cpu.gpr = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    (cpu.rip, cpu.rflags) = (rip, rflags);
}

/// The MSRs that KVM keeps, and where the state has them.
fn msrs(cpu: &mut CpuState) -> Vec<(u32, &mut u64)> {
    let m = &mut cpu.msr;
    let mut list = vec![
        (0x174, &mut m.sysenter_cs),
        (0x175, &mut m.sysenter_esp),
        (0x176, &mut m.sysenter_eip),
        (0x1a0, &mut m.misc_enable),
        (0x277, &mut m.pat),
        (0x2ff, &mut m.mtrr_def_type),
        (0xc000_0081, &mut m.star),
        (0xc000_0082, &mut m.lstar),
        (0xc000_0083, &mut m.cstar),
        (0xc000_0084, &mut m.sfmask),
        (0xc000_0102, &mut m.kernel_gs_base),
        (0xc000_0103, &mut m.tsc_aux),
    ];
    const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    list.extend(FIXED.into_iter().zip(&mut m.mtrr_fixed));
    list.extend((0x200..0x210).zip(&mut m.mtrr_variable));
    list
}

fn entries(list: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(list).map_err(|_| Error::new(libc::E2BIG))
}

/// Reads one MSR.
pub(crate) fn msr(vcpu: &VcpuFd, index: u32) -> Result<u64, Error> {
    let mut list = entries(&[kvm_msr_entry { index, ..Default::default() }])?;
    let count = vcpu.get_msrs(&mut list)?;
    Ok(list.as_slice().first().filter(|_| count == 1).map_or(0, |entry| entry.data))
}

/// Writes one MSR; one that KVM does not have may only be zero.
pub(crate) fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), Error> {
    if vcpu.set_msrs(&entries(&[kvm_msr_entry { index, data, ..Default::default() }])?)? != 1 && data != 0 {
        tracing::warn!(target: "nem", "KVM does not take MSR {index:#x} = {data:#x}");
    }
    Ok(())
}

fn push_msrs(vcpu: &VcpuFd, cpu: &CpuState) -> Result<(), Error> {
    let mut copy = cpu.clone();
    let all: Vec<kvm_msr_entry> = msrs(&mut copy)
        .into_iter()
        .map(|(index, data)| kvm_msr_entry { index, data: *data, ..Default::default() })
        .collect();
    if vcpu.set_msrs(&entries(&all)?)? == all.len() {
        return Ok(());
    }
    // KVM stops at the first that it does not have: one by one, then. What is zero need not exist.
    for entry in all {
        set_msr(vcpu, entry.index, entry.data)?;
    }
    Ok(())
}

fn take_msrs(vcpu: &VcpuFd, cpu: &mut CpuState) -> Result<(), Error> {
    let mut rest: Vec<(u32, &mut u64)> = msrs(cpu);
    while !rest.is_empty() {
        let asked: Vec<kvm_msr_entry> =
            rest.iter().map(|(index, _)| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut values = entries(&asked)?;
        let count = vcpu.get_msrs(&mut values)?;
        for ((_, place), entry) in rest.iter_mut().zip(&values.as_slice()[..count.min(asked.len())]) {
            **place = entry.data;
        }
        // The first that KVM does not have is left out.
        rest = rest.split_off((count + 1).min(rest.len()));
    }
    Ok(())
}

fn push_xsave(vcpu: &VcpuFd, cpu: &CpuState, cpuid: &CpuidTable) -> Result<(), Error> {
    if cpuid.has(bit::XSAVE) {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = cpu.xcr0;
        vcpu.set_xcrs(&xcrs)?;
    }
    let mut area = kvm_xsave::default();
    for (word, bytes) in area.region.iter_mut().zip(cpu.xsave.0.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    crate::sys::set_xsave(vcpu, &area)
}

fn take_xsave(vcpu: &VcpuFd, cpu: &mut CpuState, cpuid: &CpuidTable) -> Result<(), Error> {
    if cpuid.has(bit::XSAVE) {
        let xcrs = vcpu.get_xcrs()?;
        let found = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0);
        cpu.xcr0 = found.map_or(cpu.xcr0, |x| x.value);
    }
    let area = vcpu.get_xsave()?;
    let mut bytes = [0; XsaveArea::SIZE];
    for (out, word) in bytes.chunks_exact_mut(4).zip(&area.region) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    // KVM fills in what is in its initial state, so that those components may be named or not.
    let mut components = [0; 8];
    components.copy_from_slice(&bytes[XSTATE_BV..XSTATE_BV + 8]);
    let named = u64::from_le_bytes(components) & XSTATE_ALL | XSTATE_LEGACY;
    bytes[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&named.to_le_bytes());
    cpu.xsave.0 = bytes;
    Ok(())
}

/// Whether guests have virtualization themselves.
pub(crate) fn has_nested(cpuid: &CpuidTable) -> bool {
    cpuid.has(bit::SVM) || cpuid.has(bit::VMX)
}

/// Whether the vCPU is in a virtual machine of the guest's own now: registers, and what is delivered, are that one's.
pub(crate) fn is_nested(vcpu: &VcpuFd) -> Result<bool, Error> {
    let mut state = KvmNestedStateBuffer::empty();
    vcpu.nested_state(&mut state)?;
    Ok(u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0)
}

/// Takes back what the guest has done with its own virtualization, of which the state knows nothing: the vCPU was reset.
fn leave_nested(vcpu: &VcpuFd, cpuid: &CpuidTable) -> Result<(), Error> {
    if cpuid.has(bit::VMX) {
        // The sizes of the structure's variants differ: this one is a head alone.
        let mut state = KvmNestedStateBuffer::empty();
        state.size = size_of::<kvm_nested_state>() as u32;
        state.format = KVM_STATE_NESTED_FORMAT_VMX as u16;
        state.hdr.vmx.vmxon_pa = u64::MAX;
        state.hdr.vmx.vmcs12_pa = u64::MAX;
        vcpu.set_nested_state(&state)?;
        set_msr(vcpu, FEATURE_CONTROL, 0)?;
    } else {
        // KVM leaves by itself when EFER.SVME goes.
        set_msr(vcpu, VM_HSAVE_PA, 0)?;
    }
    Ok(())
}

/// Whether the state is that after a reset or INIT.
fn is_reset(cpu: &CpuState) -> bool {
    (cpu.rip, cpu.seg[seg::CS].base) == (0xfff0, 0xffff_0000)
}

/// Gives KVM the whole state. Nothing may be on its way to the vCPU, except for what a guest's own virtual machine has waiting: that stays.
pub(crate) fn push(vcpu: &VcpuFd, cpu: &CpuState, cpuid: &CpuidTable, cr8: u64) -> Result<(), Error> {
    let nested = has_nested(cpuid);
    if nested && is_reset(cpu) {
        leave_nested(vcpu, cpuid)?;
    }
    vcpu.set_sregs(&sregs(cpu, cr8))?;
    vcpu.set_regs(&regs(cpu))?;
    push_xsave(vcpu, cpu, cpuid)?;
    let debug = kvm_debugregs { db: cpu.dr, dr6: cpu.dr6, dr7: cpu.dr7, ..Default::default() };
    vcpu.set_debug_regs(&debug)?;
    push_msrs(vcpu, cpu)?;
    if nested && is_nested(vcpu)? {
        return Ok(());
    }
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    events.nmi.masked = cpu.nmi_blocked.into();
    if cpu.inhibit_rip == Some(cpu.rip) {
        events.interrupt.shadow = KVM_X86_SHADOW_INT_STI as u8;
    }
    vcpu.set_vcpu_events(&events)
}

/// Takes the whole state from KVM, except for what the engine keeps in `cpu` always: APIC base and the counter's offset and adjustment.
pub(crate) fn take(vcpu: &VcpuFd, cpu: &mut CpuState, cpuid: &CpuidTable, pgm: &Pgm) -> Result<(), Error> {
    take_sregs(cpu, &vcpu.get_sregs()?);
    take_regs(cpu, &vcpu.get_regs()?);
    take_xsave(vcpu, cpu, cpuid)?;
    let debug = vcpu.get_debug_regs()?;
    (cpu.dr, cpu.dr6, cpu.dr7) = (debug.db, debug.dr6, debug.dr7);
    take_msrs(vcpu, cpu)?;
    let events = vcpu.get_vcpu_events()?;
    cpu.nmi_blocked = events.nmi.masked != 0;
    let shadow = u32::from(events.interrupt.shadow) & (KVM_X86_SHADOW_INT_STI | KVM_X86_SHADOW_INT_MOV_SS);
    cpu.inhibit_rip = (shadow != 0).then_some(cpu.rip);
    if cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 && cpu.msr.efer & efer::LMA == 0 {
        // As loaded with CR3; guests that change them in memory load CR3 again.
        let mut bytes = [0; 32];
        pgm.read(GuestPhys(cpu.cr3 & 0xffff_ffe0), &mut bytes);
        for (entry, bytes) in cpu.pdpte.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            *entry = u64::from_le_bytes(word);
        }
    }
    Ok(())
}

/// What is on its way to the vCPU and has no place in [`CpuState`]: what the next entry would deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Exception(u8, u32),
    Interrupt(u8),
    Nmi,
}

/// Takes it from KVM, and an NMI that waits behind it: whether there was one.
pub(crate) fn take_delivery(vcpu: &VcpuFd) -> Result<(Option<Delivery>, bool), Error> {
    let mut events = vcpu.get_vcpu_events()?;
    let (found, nmi_waits) = (delivery(&events), events.nmi.pending != 0);
    if found.is_some() || events.interrupt.injected != 0 || nmi_waits {
        events.exception = Default::default();
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (0, 0, 0);
        (events.nmi.injected, events.nmi.pending) = (0, 0);
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
        vcpu.set_vcpu_events(&events)?;
    }
    Ok((found, nmi_waits))
}

/// Has the next entry deliver an external interrupt, which ends HLT.
pub(crate) fn deliver(vcpu: &VcpuFd, vector: u8) -> Result<(), Error> {
    let mut events = vcpu.get_vcpu_events()?;
    (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
    events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    vcpu.set_vcpu_events(&events)?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
}

/// INT n whose delivery was interrupted is left out: RIP is at it still, and it is executed again.
fn delivery(events: &kvm_vcpu_events) -> Option<Delivery> {
    let kvm_vcpu_events { exception, interrupt, nmi, .. } = events;
    if exception.injected != 0 || exception.pending != 0 {
        let code = if exception.has_error_code != 0 { exception.error_code } else { 0 };
        Some(Delivery::Exception(exception.nr, code))
    } else if interrupt.injected != 0 && interrupt.soft == 0 {
        Some(Delivery::Interrupt(interrupt.nr))
    } else if nmi.injected != 0 {
        Some(Delivery::Nmi)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_to_kvm_and_back() {
        let cpu = CpuState::reset(0);
        for s in [&cpu.seg[seg::CS], &cpu.seg[seg::DS], &cpu.tr, &cpu.ldtr] {
            assert_eq!(from_segment(&segment(s)), *s);
        }
        let mut other = cpu.clone();
        take_sregs(&mut other, &sregs(&cpu, 0));
        take_regs(&mut other, &regs(&cpu));
        assert_eq!((other.gpr, other.rip, other.cr0), (cpu.gpr, cpu.rip, cpu.cr0));
    }

    #[test]
    fn the_granularity_always_fits_the_limit() {
        let mut s = CpuState::reset(0).seg[seg::DS];
        s.attr.set_granular(true);
        s.limit = 0x1234;
        assert_eq!(segment(&s).g, 0);
        (s.limit, s.attr) = (0xffff_ffff, s.attr.with_granular(false));
        assert_eq!(segment(&s).g, 1);
    }

    #[test]
    fn what_is_on_its_way_is_found_and_an_int_instruction_is_done_again() {
        let mut events = kvm_vcpu_events::default();
        assert_eq!(delivery(&events), None);
        (events.interrupt.injected, events.interrupt.nr) = (1, 0x41);
        assert_eq!(delivery(&events), Some(Delivery::Interrupt(0x41)));
        events.interrupt.soft = 1;
        assert_eq!(delivery(&events), None);
        (events.exception.pending, events.exception.nr) = (1, 14);
        (events.exception.has_error_code, events.exception.error_code) = (1, 6);
        assert_eq!(delivery(&events), Some(Delivery::Exception(14, 6)));
    }

    #[test]
    fn every_msr_is_named_once() {
        let mut cpu = CpuState::reset(0);
        let mut numbers: Vec<u32> = msrs(&mut cpu).iter().map(|(number, _)| *number).collect();
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!((count, numbers.len()), (39, 39));
    }
}
