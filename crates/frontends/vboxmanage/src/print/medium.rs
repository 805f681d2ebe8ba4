//! `showmediuminfo` and `list hdds`.

use main_api::enums::*;

/// A medium, as far as it is shown.
#[derive(Clone, Debug)]
pub struct MediumInfo {
    pub id: String,
    /// `None` for DVDs and floppies, which have no parents to speak of.
    pub parent: Option<Parent>,
    pub state: MediumState,
    pub access_error: String,
    pub description: String,
    pub kind: MediumType,
    pub auto_reset: bool,
    pub location: String,
    pub format: String,
    pub variant: Vec<MediumVariant>,
    pub logical_size: i64,
    pub size: i64,
    pub properties: Vec<(String, String)>,
    pub users: Vec<User>,
    pub children: Vec<String>,
    /// Cipher and password's id.
    pub encryption: Option<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    Base,
    Id(String),
}

/// A machine that uses the medium, and its snapshots that do.
#[derive(Clone, Debug)]
pub struct User {
    pub name: String,
    pub id: String,
    pub snapshots: Vec<(String, String)>,
}

/// The block of one medium; `long` tells everything.
pub fn show(medium: &MediumInfo, long: bool) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| text.push_str(&format!("{label:<16}{value}\n"));
    let differencing = matches!(medium.parent, Some(Parent::Id(_)));
    line("UUID:", &medium.id);
    match &medium.parent {
        Some(Parent::Base) => line("Parent UUID:", "base"),
        Some(Parent::Id(id)) => line("Parent UUID:", id),
        None => {}
    }
    let state = match medium.state {
        MediumState::NotCreated => "not created",
        MediumState::Created => "created",
        MediumState::LockedRead => "locked read",
        MediumState::LockedWrite => "locked write",
        MediumState::Inaccessible => "inaccessible",
        MediumState::Creating => "creating",
        MediumState::Deleting => "deleting",
    };
    line("State:", state);
    if long && medium.state == MediumState::Inaccessible {
        line("Access Error:", &medium.access_error);
    }
    if long && !medium.description.is_empty() {
        line("Description:", &medium.description);
    }
    let kind = match medium.kind {
        MediumType::Normal if differencing => "normal (differencing)",
        MediumType::Normal => "normal (base)",
        MediumType::Immutable => "immutable",
        MediumType::Writethrough => "writethrough",
        MediumType::Shareable => "shareable",
        MediumType::Readonly => "readonly",
        MediumType::MultiAttach => "multiattach",
    };
    line("Type:", kind);
    if long && differencing {
        line("Auto-Reset:", if medium.auto_reset { "on" } else { "off" });
    }
    line("Location:", &medium.location);
    line("Storage format:", &medium.format);
    if long {
        let has = |variant| medium.variant.contains(&variant);
        let growth = if has(MediumVariant::Fixed) {
            "fixed"
        } else if has(MediumVariant::Diff) {
            "differencing"
        } else {
            "dynamic"
        };
        let layout = if has(MediumVariant::VmdkSplit2G) {
            "split2G"
        } else if has(MediumVariant::VmdkStreamOptimized) {
            "streamOptimized"
        } else if has(MediumVariant::VmdkESX) {
            "ESX"
        } else {
            "default"
        };
        line("Format variant:", &format!("{growth} {layout}"));
    }
    line("Capacity:", &format!("{} MBytes", medium.logical_size >> 20));
    if long {
        line("Size on disk:", &format!("{} MBytes", medium.size >> 20));
    }
    line("Encryption:", if medium.encryption.is_some() { "enabled" } else { "disabled" });
    if let (true, Some((cipher, id))) = (long, &medium.encryption) {
        line("Cipher:", cipher);
        line("Password ID:", id);
    }
    if long {
        let mut first = "Property:";
        for (name, value) in &medium.properties {
            // Whoever wants to know a secret has to ask for it (mediumproperty).
            let value = if name.ends_with("Secret") { "(hidden)" } else { value };
            line(first, &format!("{name}={value}"));
            first = "";
        }
        let mut first = "In use by VMs:";
        for user in &medium.users {
            let mut value = format!("{} (UUID: {})", user.name, user.id);
            for (name, id) in &user.snapshots {
                value.push_str(&format!(" [{name} (UUID: {id})]"));
            }
            line(first, &value);
            first = "";
        }
        let mut first = "Child UUIDs:";
        for id in &medium.children {
            line(first, id);
            first = "";
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::print::golden;

    #[test]
    fn media_print_as_virtualboxs() {
        let id = "11111111-2222-4333-8444-555555555555".to_owned();
        let user = User {
            name: "vm".into(),
            id: id.clone(),
            snapshots: vec![("s".into(), id.clone()), ("t".into(), id.clone())],
        };
        let mut medium = MediumInfo {
            id: id.clone(),
            parent: Some(Parent::Base),
            state: MediumState::Created,
            access_error: "gone".into(),
            description: "text".into(),
            kind: MediumType::Normal,
            auto_reset: false,
            location: "/vms/d.vdi".into(),
            format: "VDI".into(),
            variant: vec![MediumVariant::Standard],
            logical_size: 10 << 30,
            size: 2 << 20,
            properties: vec![("a".into(), "b".into()), ("InitiatorSecret".into(), "d".into())],
            users: vec![user.clone(), user],
            children: vec![id.clone(), id.clone()],
            encryption: None,
        };
        let mut text = show(&medium, false) + "\n" + &show(&medium, true);
        medium.parent = Some(Parent::Id(id));
        medium.state = MediumState::Inaccessible;
        medium.variant = vec![MediumVariant::Diff, MediumVariant::VmdkSplit2G];
        (medium.users, medium.children, medium.properties) = Default::default();
        medium.encryption = Some(("AES-XTS256-PLAIN64".into(), "mine".into()));
        text += "\n";
        text += &show(&medium, true);
        golden("showmediuminfo.txt", &text);
    }
}
