//! A vCPU's registers by the names that VirtualBox's debugger (DBGF) gives them.

use cpum::CpuState;

/// A register's place in the state and its width in bits.
enum Place<'a> {
    U64(&'a mut u64),
    U32(&'a mut u32),
    U16(&'a mut u16),
    /// Shown and not set: derived, or with rules of its own.
    Shown(String),
}

const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

fn places(cpu: &mut CpuState) -> Vec<(String, Place<'_>)> {
    let mut all = Vec::new();
    for (name, value) in GENERAL.iter().zip(&mut cpu.gpr) {
        all.push(((*name).to_owned(), Place::U64(value)));
    }
    all.push(("rip".to_owned(), Place::U64(&mut cpu.rip)));
    all.push(("rflags".to_owned(), Place::U64(&mut cpu.rflags)));
    let segments = SEGMENTS.into_iter().zip(&mut cpu.seg);
    for (name, segment) in segments.chain([("ldtr", &mut cpu.ldtr), ("tr", &mut cpu.tr)]) {
        let attributes = u32::from(segment.attr);
        all.push((name.to_owned(), Place::U16(&mut segment.selector)));
        all.push((format!("{name}_attr"), Place::Shown(format!("0x{attributes:08x}"))));
        all.push((format!("{name}_base"), Place::U64(&mut segment.base)));
        all.push((format!("{name}_lim"), Place::U32(&mut segment.limit)));
    }
    for (name, table) in [("gdtr", &mut cpu.gdtr), ("idtr", &mut cpu.idtr)] {
        all.push((format!("{name}_base"), Place::U64(&mut table.base)));
        all.push((format!("{name}_lim"), Place::U16(&mut table.limit)));
    }
    for (name, value) in
        [("cr0", &mut cpu.cr0), ("cr2", &mut cpu.cr2), ("cr3", &mut cpu.cr3), ("cr4", &mut cpu.cr4)]
    {
        all.push((name.to_owned(), Place::U64(value)));
    }
    for (n, value) in cpu.dr.iter_mut().enumerate() {
        all.push((format!("dr{n}"), Place::U64(value)));
    }
    for (name, value) in [
        ("dr6", &mut cpu.dr6),
        ("dr7", &mut cpu.dr7),
        ("apic_base", &mut cpu.msr.apic_base),
        ("pat", &mut cpu.msr.pat),
        ("efer", &mut cpu.msr.efer),
        ("star", &mut cpu.msr.star),
        ("lstar", &mut cpu.msr.lstar),
        ("cstar", &mut cpu.msr.cstar),
        ("sf_mask", &mut cpu.msr.sfmask),
        ("kernel_gs_base", &mut cpu.msr.kernel_gs_base),
        ("tsc_aux", &mut cpu.msr.tsc_aux),
        ("sysenter_cs", &mut cpu.msr.sysenter_cs),
        ("sysenter_eip", &mut cpu.msr.sysenter_eip),
        ("sysenter_esp", &mut cpu.msr.sysenter_esp),
        ("xcr0", &mut cpu.xcr0),
    ] {
        all.push((name.to_owned(), Place::U64(value)));
    }
    let area = &cpu.xsave.0;
    let hex = |at: usize, len: usize| -> String {
        let digits: String = area[at..at + len].iter().rev().map(|b| format!("{b:02x}")).collect();
        format!("0x{digits}")
    };
    for (name, at, len) in [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("fop", 6, 2), ("mxcsr", 24, 4)] {
        all.push((name.to_owned(), Place::Shown(hex(at, len))));
    }
    for n in 0..8 {
        all.push((format!("st{n}"), Place::Shown(hex(32 + 16 * n, 10))));
    }
    for n in 0..16 {
        all.push((format!("xmm{n}"), Place::Shown(hex(160 + 16 * n, 16))));
    }
    all
}

fn text(place: &Place<'_>) -> String {
    match place {
        Place::U64(v) => format!("0x{v:016x}"),
        Place::U32(v) => format!("0x{v:08x}"),
        Place::U16(v) => format!("0x{v:04x}"),
        Place::Shown(text) => text.clone(),
    }
}

/// Every register with its value.
pub fn all(cpu: &CpuState) -> Vec<(String, String)> {
    places(&mut cpu.clone()).into_iter().map(|(name, place)| (name, text(&place))).collect()
}

/// Sets a register to a number, decimal or with `0x`. The error is for the user.
pub fn set(cpu: &mut CpuState, name: &str, value: &str) -> Result<(), String> {
    let digits = value.trim();
    let number = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let number = number.map_err(|_| format!("Invalid value '{value}' for register '{name}'"))?;
    let mut places = places(cpu);
    let place = places.iter_mut().find(|(n, _)| n.eq_ignore_ascii_case(name));
    let too_wide = |_| format!("The value '{value}' does not fit into register '{name}'");
    match place {
        None => Err(format!("Register '{name}' was not found")),
        Some((_, Place::Shown(_))) => Err(format!("Register '{name}' cannot be set")),
        Some((_, Place::U64(v))) => {
            **v = number;
            Ok(())
        }
        Some((_, Place::U32(v))) => {
            **v = number.try_into().map_err(too_wide)?;
            Ok(())
        }
        Some((_, Place::U16(v))) => {
            **v = number.try_into().map_err(too_wide)?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_has_a_name_and_a_value_of_its_width() {
        let registers = all(&CpuState::reset(0));
        let value = |name: &str| registers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(value("rip"), Some("0x000000000000fff0"));
        assert_eq!(value("cs"), Some("0xf000"));
        assert_eq!(value("cs_base"), Some("0x00000000ffff0000"));
        assert_eq!(value("tr_lim"), Some("0x0000ffff"));
        assert_eq!(value("mxcsr"), Some("0x00001f80"));
        let mut names: Vec<_> = registers.iter().map(|(n, _)| n).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), registers.len());
    }

    #[test]
    fn registers_are_set_by_name_and_refuse_what_does_not_fit() {
        let mut cpu = CpuState::reset(0);
        set(&mut cpu, "RAX", "0x123456789abcdef0").unwrap();
        set(&mut cpu, "idtr_lim", "1023").unwrap();
        assert_eq!((cpu.gpr[0], cpu.idtr.limit), (0x1234_5678_9abc_def0, 1023));
        for (name, value) in [("cs", "0x10000"), ("nothing", "1"), ("rax", "five"), ("cs_attr", "0")] {
            assert!(set(&mut cpu, name, value).is_err(), "{name}={value}");
        }
    }
}
