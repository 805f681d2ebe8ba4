//! `createmedium`, `closemedium` and `showmediuminfo`.

use super::{Request, operand};
use crate::getopt::{Item, Opt, Parser, Value, Want, opt, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediumKind {
    Disk,
    Dvd,
    Floppy,
}

impl MediumKind {
    fn from_word(word: &str) -> Option<Self> {
        match word {
            "disk" => Some(Self::Disk),
            "dvd" => Some(Self::Dvd),
            "floppy" => Some(Self::Floppy),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateMedium {
    pub kind: MediumKind,
    /// With an extension.
    pub file: String,
    pub source: MediumSource,
    pub format: String,
    /// Values of `MediumVariant`.
    pub variant: Vec<&'static str>,
    pub properties: Vec<(String, PropertyValue)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediumSource {
    /// A new image of this many bytes.
    Size(u64),
    /// A differencing image on this UUID or file.
    Parent(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropertyValue {
    Text(String),
    File(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloseMedium {
    pub kind: MediumKind,
    pub medium: String,
    pub delete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShowMediumInfo {
    pub kind: MediumKind,
    pub medium: String,
}

/// Takes `word` as the kind of medium; `false` if it is none.
pub(super) fn kind_word(kind: &mut Option<MediumKind>, word: &str) -> Parsed<bool> {
    let Some(found) = MediumKind::from_word(word) else { return Ok(false) };
    if kind.is_some() {
        return Err(UsageError::syntax(format!("Only one command can be specified: '{word}'")));
    }
    *kind = Some(found);
    Ok(true)
}

/// `standard` starts anew, the other words add up; each may be shortened.
pub(super) fn parse_variant(text: &str, variant: &mut Vec<&'static str>) -> Parsed<()> {
    const WORDS: &[(&str, Option<&str>)] = &[
        ("standard", None),
        ("fixed", Some("Fixed")),
        ("static", Some("Fixed")),
        ("diff", Some("Diff")),
        ("split2g", Some("VmdkSplit2G")),
        ("stream", Some("VmdkStreamOptimized")),
        ("streamoptimized", Some("VmdkStreamOptimized")),
        ("esx", Some("VmdkESX")),
        ("formatted", Some("Formatted")),
        ("raw", Some("VmdkRawDisk")),
        ("rawdisk", Some("VmdkRawDisk")),
    ];
    for word in text.split(',').filter(|word| !word.is_empty()) {
        let lower = word.to_ascii_lowercase();
        match WORDS.iter().find(|(name, _)| name.starts_with(&lower)) {
            Some((_, None)) => variant.clear(),
            Some((_, Some(value))) if !variant.contains(value) => variant.push(value),
            Some(_) => {}
            None => return Err(UsageError::argument(format!("Invalid medium variant '{text}'"))),
        }
    }
    Ok(())
}

pub fn createmedium(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        File,
        Parent,
        Size,
        SizeByte,
        Format,
        Static,
        Variant,
        Property,
        PropertyFile,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["filename"], 'f', Want::Text, Key::File),
        short(&["diffparent"], 'd', Want::Text, Key::Parent),
        short(&["size"], 's', Want::U64, Key::Size),
        short(&["sizebyte"], 'S', Want::U64, Key::SizeByte),
        short(&["format"], 'o', Want::Text, Key::Format),
        short(&["static"], 'F', Want::Nothing, Key::Static),
        short(&["variant"], 'm', Want::Text, Key::Variant),
        short(&["property"], 'p', Want::Text, Key::Property),
        short(&["property-file"], 'P', Want::Text, Key::PropertyFile),
    ];
    let (mut kind, mut file, mut parent, mut size, mut format) = (None, None, None, 0, String::new());
    let (mut variant, mut properties) = (Vec::new(), Vec::new());
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, value) = match item {
            Item::Word(word) => {
                if !kind_word(&mut kind, &word)? {
                    return Err(UsageError::invalid_parameter(&word));
                }
                continue;
            }
            Item::Opt { key, value, .. } => (key, value),
        };
        match (key, value) {
            (Key::Size, Value::U64(megabytes)) => {
                let too_big = || UsageError::syntax(format!("Invalid argument format: {megabytes}"));
                size = megabytes.checked_mul(1 << 20).ok_or_else(too_big)?;
            }
            (Key::SizeByte, Value::U64(bytes)) => size = bytes,
            (Key::File, value) => file = Some(value.text()),
            (Key::Parent, value) => parent = Some(value.text()),
            (Key::Format, value) => format = value.text(),
            (Key::Static, _) => parse_variant("fixed", &mut variant)?,
            (Key::Variant, value) => parse_variant(&value.text(), &mut variant)?,
            (Key::Property | Key::PropertyFile, value) => {
                let text = value.text();
                let Some((name, value)) = text.split_once('=') else {
                    return Err(UsageError::failure("Invalid key value pair: No '='."));
                };
                let value = match key {
                    Key::PropertyFile => PropertyValue::File(value.to_owned()),
                    _ => PropertyValue::Text(value.to_owned()),
                };
                properties.push((name.to_owned(), value));
            }
            (Key::Size | Key::SizeByte, _) => {}
        }
    }
    let kind = kind.unwrap_or(MediumKind::Disk);
    let mut file = file
        .filter(|file| !file.is_empty())
        .ok_or_else(|| UsageError::syntax("Parameter --filename is required"))?;
    let extension = extension(&file).map(str::to_owned);
    let source = match parent {
        Some(parent) => {
            if kind != MediumKind::Disk {
                return Err(UsageError::syntax(
                    "Creating a differencing medium is only supported for hard disks",
                ));
            }
            variant = vec!["Diff"];
            if format.is_empty() {
                format = extension.clone().unwrap_or_else(|| "VDI".to_owned());
            }
            MediumSource::Parent(parent)
        }
        None => {
            let raw_disk = variant.contains(&"VmdkRawDisk");
            if size == 0 && !raw_disk {
                return Err(UsageError::syntax("Parameter --size is required"));
            }
            if format.is_empty() {
                if kind == MediumKind::Disk {
                    format = "VDI".to_owned();
                } else {
                    format = "RAW".to_owned();
                    parse_variant("fixed", &mut variant)?;
                }
            }
            if raw_disk && format != "VMDK" {
                return Err(UsageError::syntax("Variant 'Rawdisk' requires '--format=VMDK'"));
            }
            MediumSource::Size(size)
        }
    };
    if extension.is_none() {
        file.push_str(match kind {
            MediumKind::Disk => match format.to_ascii_lowercase().as_str() {
                "vmdk" => ".vmdk",
                "vhd" => ".vhd",
                "vhdx" => ".vhdx",
                "qcow" => ".qcow",
                "parallels" => ".hdd",
                _ => ".vdi",
            },
            MediumKind::Dvd => ".iso",
            MediumKind::Floppy => ".img",
        });
    }
    Ok(Request::CreateMedium(CreateMedium { kind, file, source, format, variant, properties }))
}

/// What follows the last dot of a file's name, if there is something on both sides of it.
fn extension(file: &str) -> Option<&str> {
    let name = file.rsplit('/').next().unwrap_or(file);
    match name.rsplit_once('.') {
        Some((stem, extension)) if !stem.is_empty() && !extension.is_empty() => Some(extension),
        _ => None,
    }
}

pub fn closemedium(words: &[String]) -> Parsed<Request> {
    static TABLE: &[Opt<()>] = &[short(&["delete"], 'r', Want::Nothing, ())];
    let (mut kind, mut medium, mut delete) = (None, None, false);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Opt { .. } => delete = true,
            Item::Word(word) => {
                if !kind_word(&mut kind, &word)? {
                    operand(&mut medium, word)?;
                }
            }
        }
    }
    let medium = medium.ok_or_else(|| UsageError::syntax("Medium name or UUID required"))?;
    Ok(Request::CloseMedium(CloseMedium { kind: kind.unwrap_or(MediumKind::Disk), medium, delete }))
}

pub fn showmediuminfo(words: &[String]) -> Parsed<Request> {
    static TABLE: &[Opt<()>] = &[opt(&[], Want::Nothing, ())];
    let (mut kind, mut medium) = (None, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        if let Item::Word(word) = item {
            if !kind_word(&mut kind, &word)? {
                operand(&mut medium, word)?;
            }
        }
    }
    let medium = medium.ok_or_else(|| UsageError::syntax("Medium name or UUID required"))?;
    Ok(Request::ShowMediumInfo(ShowMediumInfo { kind: kind.unwrap_or(MediumKind::Disk), medium }))
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    fn create(line: &str) -> CreateMedium {
        match createmedium(&words(line)) {
            Ok(Request::CreateMedium(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_disk_is_a_vdi_unless_said_otherwise() {
        let request = create("--filename a --size 10");
        assert_eq!(request.kind, MediumKind::Disk);
        assert_eq!((request.file.as_str(), request.format.as_str()), ("a.vdi", "VDI"));
        assert_eq!(request.source, MediumSource::Size(10 << 20));
        assert!(request.variant.is_empty());
        let request = create("disk --format VDI --filename b.vdi --sizebyte=512 --variant Fixed");
        assert_eq!(request.source, MediumSource::Size(512));
        assert_eq!(request.variant, ["Fixed"]);
    }

    #[test]
    fn extensions_follow_kind_and_format() {
        assert_eq!(create("--filename d.1/a --size 1 --format VMDK").file, "d.1/a.vmdk");
        let dvd = create("dvd --filename a --size 1");
        assert_eq!((dvd.file.as_str(), dvd.format.as_str()), ("a.iso", "RAW"));
        assert_eq!(dvd.variant, ["Fixed"]);
        assert_eq!(create("floppy --filename a --size 1").file, "a.img");
    }

    #[test]
    fn standard_resets_the_variant() {
        assert_eq!(create("--filename a --size 1 --variant Fixed,Standard,Split2G").variant, ["VmdkSplit2G"]);
        assert_eq!(create("--filename a --size 1 --static --variant fix").variant, ["Fixed"]);
        assert_eq!(
            createmedium(&words("--filename a --size 1 --variant wobbly")),
            Err(UsageError::argument("Invalid medium variant 'wobbly'"))
        );
    }

    #[test]
    fn what_is_required_is_asked_for() {
        for (line, text) in [
            ("--size 1", "Parameter --filename is required"),
            ("--filename a", "Parameter --size is required"),
            ("disk dvd", "Only one command can be specified: 'dvd'"),
            ("--filename a --size 1 tape", "Invalid parameter 'tape'"),
            ("--filename a --size 1 --variant rawdisk", "Variant 'Rawdisk' requires '--format=VMDK'"),
        ] {
            assert_eq!(createmedium(&words(line)), Err(UsageError::syntax(text)), "{line}");
        }
    }

    #[test]
    fn a_difference_takes_its_parents_size() {
        let request = create("--filename a.vdi --diffparent p.vdi");
        assert_eq!(request.source, MediumSource::Parent("p.vdi".into()));
        assert_eq!((request.format.as_str(), request.variant), ("vdi", vec!["Diff"]));
    }

    #[test]
    fn closemedium_takes_the_kind_anywhere() {
        for line in ["dvd a.iso --delete", "--delete a.iso dvd"] {
            let expected = CloseMedium { kind: MediumKind::Dvd, medium: "a.iso".into(), delete: true };
            assert_eq!(closemedium(&words(line)), Ok(Request::CloseMedium(expected)), "{line}");
        }
        let expected = ShowMediumInfo { kind: MediumKind::Disk, medium: "a.vdi".into() };
        assert_eq!(showmediuminfo(&words("a.vdi")), Ok(Request::ShowMediumInfo(expected)));
    }
}
