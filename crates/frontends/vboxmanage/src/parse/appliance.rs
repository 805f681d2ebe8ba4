//! `import`, `export` and `clonevm`.

use main_api::enums::{ApiEnum, CloneMode, CloneOptions, ExportOptions, ImportOptions};
use uuid::Uuid;

use super::modifyvm::split_groups;
use super::{Request, operand};
use crate::getopt::{Item, Opt, Parser, Value, Want, opt, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Import {
    pub file: String,
    pub dry_run: bool,
    pub detailed_progress: bool,
    pub options: Vec<ImportOptions>,
    /// What `--vsys` and the options after it say, in their order.
    pub changes: Vec<SystemChange>,
}

/// A change to one machine of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemChange {
    pub system: u32,
    pub what: ImportField,
    pub value: String,
}

/// What `import` can change. Units are numbered as `import` lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportField {
    OsType,
    Name,
    SettingsFile,
    BaseFolder,
    Group,
    Memory,
    Cpus,
    Description,
    Eula,
    Ignore(u32),
    ScsiType(u32),
    Controller(u32),
    Port(u32),
    Disk(u32),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    pub vms: Vec<String>,
    pub output: String,
    /// `ovf-1.0` and the like.
    pub format: &'static str,
    pub options: Vec<ExportOptions>,
    /// Machine (in the order of `vms`), the entry, and its text.
    pub texts: Vec<(u32, ExportField, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportField {
    Name,
    Product,
    ProductUrl,
    Vendor,
    VendorUrl,
    Version,
    Description,
    Eula,
    EulaFile,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneVm {
    pub vm: String,
    pub name: String,
    pub groups: Vec<String>,
    pub base_folder: String,
    pub uuid: Option<Uuid>,
    pub register: bool,
    pub snapshot: Option<String>,
    pub mode: CloneMode,
    pub options: Vec<CloneOptions>,
}

/// A comma-separated list of words out of `words`, in any case.
fn word_list<T: Copy>(text: &str, words: &[(&str, T)]) -> Option<Vec<T>> {
    let find = |word: &str| words.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, v)| *v);
    text.split(',').filter(|w| !w.is_empty()).map(find).collect()
}

/// A word that a cloud service would be behind.
fn no_cloud<T>() -> Parsed<T> {
    Err(UsageError::failure("Cloud services are not available in this version"))
}

pub fn import(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        DryRun,
        Detailed,
        System,
        Unit,
        Options,
        Cloud,
        Field(ImportField),
    }
    use ImportField as F;
    static TABLE: &[Opt<Key>] = &[
        short(&["dry-run", "dryrun"], 'n', Want::Nothing, Key::DryRun),
        short(&["detailed-progress"], 'P', Want::Nothing, Key::Detailed),
        short(&["vsys"], 's', Want::U32, Key::System),
        short(&["ostype"], 'o', Want::Text, Key::Field(F::OsType)),
        short(&["vmname"], 'V', Want::Text, Key::Field(F::Name)),
        short(&["settingsfile"], 'S', Want::Text, Key::Field(F::SettingsFile)),
        short(&["basefolder"], 'p', Want::Text, Key::Field(F::BaseFolder)),
        short(&["group"], 'g', Want::Text, Key::Field(F::Group)),
        short(&["memory"], 'm', Want::Text, Key::Field(F::Memory)),
        short(&["cpus"], 'c', Want::Text, Key::Field(F::Cpus)),
        short(&["description"], 'd', Want::Text, Key::Field(F::Description)),
        short(&["eula"], 'L', Want::Text, Key::Field(F::Eula)),
        short(&["unit"], 'u', Want::U32, Key::Unit),
        short(&["ignore"], 'x', Want::Nothing, Key::Field(F::Ignore(0))),
        short(&["scsitype", "type"], 'T', Want::Text, Key::Field(F::ScsiType(0))),
        short(&["controller"], 'C', Want::Text, Key::Field(F::Controller(0))),
        short(&["port"], 'E', Want::Text, Key::Field(F::Port(0))),
        short(&["disk"], 'D', Want::Text, Key::Field(F::Disk(0))),
        short(&["options"], 'O', Want::Text, Key::Options),
        short(&["cloud"], 'j', Want::Nothing, Key::Cloud),
    ];
    let mut request = Import::default();
    let (mut file, mut system, mut unit) = (None, None, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, name, value) = match item {
            Item::Word(word) => {
                operand(&mut file, word)?;
                continue;
            }
            Item::Opt { key, name, value, .. } => (key, name, value),
        };
        match key {
            Key::DryRun => request.dry_run = true,
            Key::Detailed => request.detailed_progress = true,
            Key::Cloud => return no_cloud(),
            Key::Options => {
                let text = value.text();
                let known: Vec<(&str, ImportOptions)> =
                    ImportOptions::ALL.iter().map(|o| (o.name(), *o)).collect();
                let given = word_list(&text, &known)
                    .ok_or_else(|| UsageError::argument(format!("Invalid import options '{text}'")))?;
                request.options.extend(given);
            }
            Key::System => (system, unit) = (Some(value.u32()), None),
            Key::Unit => {
                requires_system(system, &name)?;
                unit = Some(value.u32());
            }
            Key::Field(field) => {
                let system = requires_system(system, &name)?;
                let of_unit = |make: fn(u32) -> F| {
                    unit.map(make).ok_or_else(|| {
                        UsageError::syntax(format!("Option \"{name}\" requires preceding --unit option."))
                    })
                };
                let what = match field {
                    F::Ignore(_) => of_unit(F::Ignore)?,
                    F::ScsiType(_) => of_unit(F::ScsiType)?,
                    F::Controller(_) => of_unit(F::Controller)?,
                    F::Port(_) => of_unit(F::Port)?,
                    F::Disk(_) => of_unit(F::Disk)?,
                    other => other,
                };
                request.changes.push(SystemChange { system, what, value: value.text() });
            }
        }
    }
    request.file = file.ok_or_else(|| UsageError::syntax("Not enough arguments for \"import\" command."))?;
    Ok(Request::Import(request))
}

fn requires_system(system: Option<u32>, name: &str) -> Parsed<u32> {
    system.ok_or_else(|| UsageError::syntax(format!("Option \"{name}\" requires preceding --vsys option.")))
}

pub fn export(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Output,
        Format(&'static str),
        Manifest,
        Iso,
        System,
        Options,
        Cloud,
        Field(ExportField),
    }
    use ExportField as F;
    static TABLE: &[Opt<Key>] = &[
        short(&["output"], 'o', Want::Text, Key::Output),
        short(&["ovf09", "legacy09"], 'l', Want::Nothing, Key::Format("ovf-0.9")),
        short(&["ovf10"], '1', Want::Nothing, Key::Format("ovf-1.0")),
        short(&["ovf20"], '2', Want::Nothing, Key::Format("ovf-2.0")),
        short(&["opc10"], 'c', Want::Nothing, Key::Format("opc-1.0")),
        short(&["manifest"], 'm', Want::Nothing, Key::Manifest),
        short(&["iso"], 'I', Want::Nothing, Key::Iso),
        short(&["vsys"], 's', Want::U32, Key::System),
        short(&["vmname"], 'V', Want::Text, Key::Field(F::Name)),
        short(&["product"], 'p', Want::Text, Key::Field(F::Product)),
        short(&["producturl"], 'P', Want::Text, Key::Field(F::ProductUrl)),
        short(&["vendor"], 'n', Want::Text, Key::Field(F::Vendor)),
        short(&["vendorurl"], 'N', Want::Text, Key::Field(F::VendorUrl)),
        short(&["version"], 'v', Want::Text, Key::Field(F::Version)),
        short(&["description"], 'd', Want::Text, Key::Field(F::Description)),
        short(&["eula"], 'e', Want::Text, Key::Field(F::Eula)),
        short(&["eulafile"], 'E', Want::Text, Key::Field(F::EulaFile)),
        short(&["options"], 'O', Want::Text, Key::Options),
        short(&["cloud"], 'C', Want::U32, Key::Cloud),
    ];
    const OPTIONS: &[(&str, ExportOptions)] = &[
        ("manifest", ExportOptions::CreateManifest),
        ("CreateManifest", ExportOptions::CreateManifest),
        ("iso", ExportOptions::ExportDVDImages),
        ("ExportDVDImages", ExportOptions::ExportDVDImages),
        ("nomacs", ExportOptions::StripAllMACs),
        ("StripAllMACs", ExportOptions::StripAllMACs),
        ("nomacsbutnat", ExportOptions::StripAllNonNATMACs),
        ("StripAllNonNATMACs", ExportOptions::StripAllNonNATMACs),
    ];
    let mut request = Export { format: "ovf-1.0", ..Export::default() };
    let mut system = None;
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, name, value) = match item {
            Item::Word(word) => {
                request.vms.push(word);
                continue;
            }
            Item::Opt { key, name, value, .. } => (key, name, value),
        };
        match key {
            Key::Output if !request.output.is_empty() => {
                return Err(UsageError::syntax("You can only specify --output once."));
            }
            Key::Output => request.output = value.text(),
            Key::Format("opc-1.0") | Key::Cloud => return no_cloud(),
            Key::Format(format) => request.format = format,
            Key::Manifest => request.options.push(ExportOptions::CreateManifest),
            Key::Iso => request.options.push(ExportOptions::ExportDVDImages),
            Key::Options => {
                let text = value.text();
                let given = word_list(&text, OPTIONS)
                    .ok_or_else(|| UsageError::argument(format!("Invalid export options '{text}'")))?;
                request.options.extend(given);
            }
            Key::System => system = Some(value.u32()),
            Key::Field(field) => request.texts.push((requires_system(system, &name)?, field, value.text())),
        }
    }
    if request.vms.is_empty() {
        return Err(UsageError::syntax("At least one machine must be specified with the export command."));
    }
    if request.output.is_empty() {
        return Err(UsageError::syntax("Missing --output argument with export command."));
    }
    let count = request.vms.len();
    if let Some((system, ..)) = request.texts.iter().find(|(system, ..)| *system as usize >= count) {
        return Err(UsageError::syntax(format!(
            "Invalid index {system} with -vsys option; you specified only {count} virtual system(s)."
        )));
    }
    Ok(Request::Export(request))
}

pub fn clonevm(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Snapshot,
        Name,
        Groups,
        Mode,
        Options,
        Register,
        BaseFolder,
        Uuid,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["snapshot"], 's', Want::Text, Key::Snapshot),
        short(&["name"], 'n', Want::Text, Key::Name),
        short(&["groups"], 'g', Want::Text, Key::Groups),
        short(&["mode"], 'm', Want::Text, Key::Mode),
        short(&["options"], 'o', Want::Text, Key::Options),
        short(&["register"], 'r', Want::Nothing, Key::Register),
        short(&["basefolder"], 'p', Want::Text, Key::BaseFolder),
        opt(&["uuid"], Want::Uuid, Key::Uuid),
    ];
    const MODES: &[(&str, CloneMode)] = &[
        ("machine", CloneMode::MachineState),
        ("machineandchildren", CloneMode::MachineAndChildStates),
        ("all", CloneMode::AllStates),
    ];
    let mut vm = None;
    let mut request = CloneVm {
        vm: String::new(),
        name: String::new(),
        groups: Vec::new(),
        base_folder: String::new(),
        uuid: None,
        register: false,
        snapshot: None,
        mode: CloneMode::MachineState,
        options: Vec::new(),
    };
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, value) = match item {
            Item::Word(word) => {
                operand(&mut vm, word)?;
                continue;
            }
            Item::Opt { key, value, .. } => (key, value),
        };
        match key {
            Key::Snapshot => request.snapshot = Some(value.text()),
            Key::Name => request.name = value.text(),
            Key::Groups => request.groups.extend(split_groups(&value.text())),
            Key::Mode => {
                let text = value.text();
                let found = MODES.iter().find(|(name, _)| name.eq_ignore_ascii_case(&text));
                request.mode = found
                    .map(|(_, mode)| *mode)
                    .ok_or_else(|| UsageError::argument(format!("Invalid clone mode '{text}'")))?;
            }
            Key::Options => {
                let text = value.text();
                let known: Vec<(&str, CloneOptions)> =
                    CloneOptions::ALL.iter().map(|o| (o.name(), *o)).collect();
                let given = word_list(&text, &known)
                    .ok_or_else(|| UsageError::argument(format!("Invalid clone options '{text}'")))?;
                request.options.extend(given);
            }
            Key::Register => request.register = true,
            Key::BaseFolder => request.base_folder = value.text(),
            Key::Uuid => {
                if let Value::Uuid(uuid) = value {
                    request.uuid = Some(uuid);
                }
            }
        }
    }
    request.vm = vm.ok_or_else(|| UsageError::syntax("VM name required"))?;
    Ok(Request::CloneVm(request))
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn vagrants_import_is_understood() {
        let line = "import-is-gone box.ovf --vsys 0 --vmname x_1 --vsys 0 --unit 9 --disk /v/x_1/d.vmdk";
        let words: Vec<String> = words(line)[1..].to_vec();
        let Ok(Request::Import(request)) = import(&words) else { panic!() };
        assert_eq!(request.file, "box.ovf");
        let change = |what, value: &str| SystemChange { system: 0, what, value: value.into() };
        assert_eq!(
            request.changes,
            [change(ImportField::Name, "x_1"), change(ImportField::Disk(9), "/v/x_1/d.vmdk")]
        );
        let Ok(Request::Import(dry)) = import(&["-n".into(), "b.ovf".into()]) else { panic!() };
        assert!(dry.dry_run);
    }

    #[test]
    fn options_of_a_machine_need_its_number() {
        assert_eq!(
            import(&words("a.ovf --vmname x")),
            Err(UsageError::syntax("Option \"--vmname\" requires preceding --vsys option."))
        );
        assert_eq!(
            import(&words("a.ovf --vsys 0 --ignore")),
            Err(UsageError::syntax("Option \"--ignore\" requires preceding --unit option."))
        );
        assert!(matches!(import(&words("-n")), Err(UsageError::Syntax(_))));
        assert!(matches!(import(&words("a.ovf --options frob")), Err(UsageError::Argument(_))));
    }

    #[test]
    fn export_knows_versions_options_and_texts() {
        let Ok(Request::Export(request)) =
            export(&words("a b -o p.ova --ovf20 --options manifest,nomacs --vsys 1 --product P"))
        else {
            panic!()
        };
        assert_eq!(request.vms, ["a", "b"]);
        assert_eq!((request.output.as_str(), request.format), ("p.ova", "ovf-2.0"));
        assert_eq!(request.options, [ExportOptions::CreateManifest, ExportOptions::StripAllMACs]);
        assert_eq!(request.texts, [(1, ExportField::Product, "P".to_owned())]);
        assert!(export(&words("a")).is_err());
        assert!(export(&words("a -o p.ova --vsys 1 --product P")).is_err());
    }

    #[test]
    fn clonevm_knows_modes_and_options() {
        let Ok(Request::CloneVm(request)) =
            clonevm(&words("a --name b --register --mode ALL --options KeepAllMacs,keepdisknames"))
        else {
            panic!()
        };
        assert_eq!((request.vm.as_str(), request.name.as_str(), request.register), ("a", "b", true));
        assert_eq!(request.mode, CloneMode::AllStates);
        assert_eq!(request.options, [CloneOptions::KeepAllMACs, CloneOptions::KeepDiskNames]);
        assert!(clonevm(&words("a --mode some")).is_err());
    }
}
