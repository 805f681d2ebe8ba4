//! Operating systems by CIM number (DMTF's `CIM_OperatingSystem.OSType`), for descriptors that do not name VirtualBox's type.

/// CIM number and the type that an import suggests for it. The first entry of a type is what an export writes.
const TABLE: &[(u32, &str)] = &[
    (0, "Other"),
    (1, "Other"),
    (2, "MacOS"),
    (16, "DOS"),
    (15, "WindowsNT4"),
    (14, "WindowsNT3x"),
    (17, "Windows31"),
    (18, "Windows95"),
    (19, "Windows98"),
    (36, "Linux"),
    (29, "Solaris"),
    (30, "Solaris"),
    (42, "FreeBSD"),
    (41, "OpenBSD"),
    (58, "Windows2000"),
    (63, "WindowsMe"),
    (67, "WindowsXP"),
    (69, "Windows2003"),
    (70, "Windows2003_64"),
    (71, "WindowsXP_64"),
    (73, "WindowsVista"),
    (74, "WindowsVista_64"),
    (76, "Windows2008"),
    (77, "Windows2008_64"),
    (78, "FreeBSD_64"),
    (79, "RedHat"),
    (80, "RedHat_64"),
    (81, "Solaris_64"),
    (82, "OpenSUSE"),
    (83, "OpenSUSE_64"),
    (84, "OpenSUSE"),
    (85, "OpenSUSE_64"),
    (89, "Mandriva"),
    (90, "Mandriva_64"),
    (91, "Turbolinux"),
    (92, "Turbolinux_64"),
    (93, "Ubuntu"),
    (94, "Ubuntu_64"),
    (95, "Debian"),
    (96, "Debian_64"),
    (97, "Linux24"),
    (98, "Linux24_64"),
    (99, "Linux26"),
    (100, "Linux26_64"),
    (101, "Linux_64"),
    (102, "Other_64"),
    (103, "Windows2008_64"),
    (105, "Windows7"),
    (105, "Windows7_64"),
    (106, "RedHat"),
    (107, "RedHat_64"),
    (109, "Oracle"),
    (110, "Oracle_64"),
    (113, "Windows2012_64"),
    (114, "Windows8_64"),
    (115, "Windows81_64"),
    (116, "Windows2012_64"),
    (117, "Windows2016_64"),
    (120, "Windows10_64"),
    (121, "Windows2016_64"),
];

/// VirtualBox's type for a CIM number. `description` may name it outright.
pub fn os_type_of(cim: u32, description: &str) -> &'static str {
    // VirtualBox 2.2 and later write their own id there.
    if let Some(os) = settings::OsType::by_id(description.trim()) {
        return os.id;
    }
    let found = TABLE.iter().find(|(number, _)| *number == cim).map_or("Other", |(_, id)| id);
    if description.contains("64-bit") || description.contains("64 bit") {
        let wide = format!("{found}_64");
        if let Some(os) = settings::OsType::by_id(&wide) {
            return os.id;
        }
    }
    found
}

/// The CIM number for VirtualBox's type.
pub fn cim_of(os_type: &str) -> u32 {
    let exact = TABLE.iter().find(|(_, id)| *id == os_type);
    let family = || {
        let os = settings::OsType::by_id(os_type)?;
        Some(match (os.family, os.is_64bit()) {
            (settings::OsFamily::Linux, false) => 36,
            (settings::OsFamily::Linux, true) => 101,
            (settings::OsFamily::Windows, _) => 1,
            (settings::OsFamily::MacOs, _) => 2,
            (_, true) => 102,
            _ => 1,
        })
    };
    exact.map(|(number, _)| *number).or_else(family).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_have_a_number_survive_the_way_there_and_back() {
        for id in ["Debian_64", "Ubuntu", "Linux26_64", "Windows7_64", "Other"] {
            assert_eq!(os_type_of(cim_of(id), id), id);
        }
        assert_eq!(os_type_of(96, "Some Debian"), "Debian_64");
        assert_eq!(os_type_of(80, "Red Hat Enterprise Linux 5 (64-bit)"), "RedHat_64");
        assert_eq!(os_type_of(9999, ""), "Other");
    }

    #[test]
    fn every_type_of_the_table_exists() {
        for (_, id) in TABLE {
            assert!(settings::OsType::by_id(id).is_some(), "{id}");
        }
    }
}
