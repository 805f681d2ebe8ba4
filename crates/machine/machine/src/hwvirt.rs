//! What hardware virtualization does here against what the settings ask for: large pages, the processor's aids, and defences against attacks by
//! way of the processor (VirtualBox manual, 13.4.1). KVM and the host's kernel decide about most of it; VBox.log says what they decided.

use std::fs;
use std::path::Path;

use pgm::HostMemory;

use crate::config::HwVirt;
use crate::engine::Kind;

const PARAMETERS: &str = "/sys/module";
const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";
const LARGE_SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// A parameter of a kernel module.
fn parameter(module: &str, name: &str) -> Option<String> {
    read(Path::new(PARAMETERS).join(module).join("parameters").join(name))
}

/// The chosen word of a list like `always [advise] never`.
fn chosen(list: &str) -> Option<&str> {
    list.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

/// Asks for large pages if the settings do, and says what comes of it.
pub fn large_pages(wanted: bool, ram: &HostMemory) -> String {
    if !wanted {
        return "large pages: not asked for (--large-pages)".into();
    }
    let advised = ram.advise_large_pages();
    let host = read(LARGE_SHARED);
    match (advised, host.as_deref().and_then(chosen)) {
        (Err(error), _) => format!("large pages: asked for, and the host's kernel has none: {error}"),
        (Ok(()), Some("never" | "deny") | None) => format!(
            "large pages: asked for, but the host gives shared memory none; \"echo advise > {LARGE_SHARED}\" as root allows them"
        ),
        (Ok(()), Some(word)) => format!("large pages: asked for, and the host allows them ({word})"),
    }
}

/// Lines for VBox.log about what KVM makes of the settings. Nothing for the software engines, which use none of it.
pub fn describe(engine: Kind, settings: &HwVirt) -> Vec<String> {
    if engine != Kind::Kvm {
        return Vec::new();
    }
    let mut lines = aids(settings, &parameter);
    lines.extend(defences(settings, &|name| read(Path::new(VULNERABILITIES).join(name))));
    if let Some(flush) = parameter("kvm_intel", "vmentry_l1d_flush") {
        lines.push(format!("L1 data cache at VM entry: kvm_intel.vmentry_l1d_flush is \"{flush}\""));
    }
    lines
}

/// The processor's aids, which KVM switches for all VMs alike. `value` gives a module's parameter.
fn aids(settings: &HwVirt, value: &dyn Fn(&str, &str) -> Option<String>) -> Vec<String> {
    let intel = value("kvm_intel", "ept").is_some();
    let list: &[(&str, bool, &str)] = if intel {
        &[
            ("nested paging", settings.nested_paging, "ept"),
            ("VPID", settings.vpid, "vpid"),
            ("unrestricted guest", settings.unrestricted_execution, "unrestricted_guest"),
        ]
    } else {
        &[("nested paging", settings.nested_paging, "npt")]
    };
    let module = if intel { "kvm_intel" } else { "kvm_amd" };
    list.iter()
        .filter_map(|&(what, wanted, name)| {
            let has = matches!(value(module, name)?.as_str(), "Y" | "1");
            let word = |on| if on { "on" } else { "off" };
            let note = if has == wanted {
                String::new()
            } else {
                format!(
                    ", though the settings say {}: {module}.{name} is for all VMs of the host",
                    word(wanted)
                )
            };
            Some(format!("{what}: {} in KVM{note}", word(has)))
        })
        .collect()
}

/// What the host's kernel does about what the settings want cleared or flushed. `state` gives a vulnerability's line.
fn defences(settings: &HwVirt, state: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let list = [
        (
            [
                ("--ibpb-on-vm-entry", settings.ibpb_on_vm_entry),
                ("--ibpb-on-vm-exit", settings.ibpb_on_vm_exit),
            ],
            "spectre_v2",
            "KVM has the branch predictors cleared when another VM's vCPU gets the CPU",
        ),
        (
            [
                ("--l1d-flush-on-vm-entry", settings.l1d_flush_on_vm_entry),
                ("--l1d-flush-on-sched", settings.l1d_flush_on_sched),
            ],
            "l1tf",
            "KVM flushes the L1 data cache before it enters guest code where that is needed (CVE-2018-3646)",
        ),
        (
            [
                ("--mds-clear-on-vm-entry", settings.mds_clear_on_vm_entry),
                ("--mds-clear-on-sched", settings.mds_clear_on_sched),
            ],
            "mds",
            "KVM clears the CPU's buffers before it enters guest code where that is needed",
        ),
        (
            [("--spec-ctrl", settings.spec_ctrl), ("", false)],
            "spectre_v2",
            "the controls of speculation stay with the host: guests do not find them",
        ),
    ];
    list.iter()
        .filter_map(|(options, vulnerability, what)| {
            let set: Vec<&str> = options.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
            if set.is_empty() {
                return None;
            }
            let state = state(vulnerability).unwrap_or_else(|| "the kernel does not tell".into());
            Some(format!("{}: KVM decides. {what}. {vulnerability}: {state}", set.join(" ")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_stands_in_brackets() {
        assert_eq!(chosen("always within_size [advise] never deny force"), Some("advise"));
        assert_eq!(chosen("on"), None);
    }

    #[test]
    fn what_kvm_does_otherwise_than_the_settings_say_is_told() {
        let value = |module: &str, name: &str| match (module, name) {
            ("kvm_intel", "ept" | "unrestricted_guest") => Some("Y".to_owned()),
            ("kvm_intel", "vpid") => Some("N".to_owned()),
            _ => None,
        };
        let settings =
            HwVirt { nested_paging: true, vpid: true, unrestricted_execution: false, ..HwVirt::default() };
        let lines = aids(&settings, &value);
        assert_eq!(lines[0], "nested paging: on in KVM");
        assert!(lines[1].starts_with("VPID: off in KVM, though the settings say on"), "{}", lines[1]);
        assert!(lines[2].contains("unrestricted guest: on") && lines[2].contains("say off"), "{}", lines[2]);
    }

    #[test]
    fn each_defence_that_is_asked_for_is_answered_with_the_kernels_word() {
        let settings = HwVirt { mds_clear_on_sched: true, ibpb_on_vm_exit: true, ..HwVirt::default() };
        let lines =
            defences(&settings, &|name| (name == "mds").then(|| "Mitigation: Clear CPU buffers".into()));
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("--ibpb-on-vm-exit") && lines[0].contains("does not tell"));
        assert!(
            lines[1].contains("--mds-clear-on-sched") && lines[1].ends_with("Mitigation: Clear CPU buffers")
        );
        assert!(defences(&HwVirt::default(), &|_| None).is_empty());
    }
}
