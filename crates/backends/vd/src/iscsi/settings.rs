//! What is on record about a disk of a target: VirtualBox's properties of media of the format `iSCSI`.

use std::time::Duration;

use zeroize::Zeroizing;

/// Where targets listen that say nothing else.
const DEFAULT_PORT: u16 = 3260;
/// Most bytes of one write command, and of one PDU; VirtualBox's limit, too.
pub(super) const MOST: u32 = 262_144;
/// Names are iSCSI names (RFC 7143 4.2.7: up to 223 bytes), CHAP's names and secrets are as short in practice.
const LONGEST_NAME: usize = 223;
const LONGEST_SECRET: usize = 255;

/// What is wrong with the properties of a medium.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("its property {0} is missing")]
    Missing(&'static str),
    #[error("its property {name} is '{value}', which is not {wanted}")]
    Bad { name: &'static str, value: String, wanted: &'static str },
    #[error("its property {0} is longer than such names are")]
    TooLong(&'static str),
    #[error("its secret is stored encrypted (InitiatorSecretEncrypted); give it anew with --password")]
    EncryptedSecret,
    #[error(
        "it is reached through an internal network (HostIPStack=0); only the host's own network is supported"
    )]
    InternalNetwork,
}

/// A name and its secret for CHAP.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) secret: Zeroizing<Vec<u8>>,
}

/// A disk of an iSCSI target, and how to reach it.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) name: String,
    /// As SAM addresses it.
    pub(super) lun: u64,
    /// What we call ourselves; made of the host's address if `None`.
    pub(super) initiator: Option<String>,
    pub(super) account: Option<Account>,
    /// What the target has to prove to know in turn.
    pub(super) target_account: Option<Account>,
    pub(super) write_split: u32,
    /// How long the target may be silent while we wait for it.
    pub(super) timeout: Duration,
}

/// Secrets stay out of logs.
impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "iSCSI target {} at {}", self.name, self.portal())
    }
}

impl Target {
    /// From a medium's properties.
    pub fn new<'a>(property: impl Fn(&str) -> Option<&'a str>) -> Result<Self, SettingsError> {
        let given = |name: &'static str| property(name).filter(|value| !value.is_empty());
        let text = |name, longest| match given(name) {
            Some(value) if value.len() > longest || value.contains('\0') => Err(SettingsError::TooLong(name)),
            value => Ok(value.map(str::to_owned)),
        };
        let number = |name: &'static str, default: u32, wanted: &'static str| {
            given(name).map_or(Ok(default), |value| {
                value.parse().map_err(|_| SettingsError::Bad { name, value: value.to_owned(), wanted })
            })
        };
        let account = |name, secret| -> Result<Option<Account>, SettingsError> {
            let secret = text(secret, LONGEST_SECRET)?.unwrap_or_default();
            let secret = Zeroizing::new(secret.into_bytes());
            Ok(text(name, LONGEST_NAME)?.map(|name| Account { name, secret }))
        };
        let required = |name| text(name, LONGEST_NAME)?.ok_or(SettingsError::Missing(name));
        let address = required("TargetAddress")?;
        let (host, port) = split_address(&address).ok_or_else(|| SettingsError::Bad {
            name: "TargetAddress",
            value: address.clone(),
            wanted: "a host or HOST:PORT",
        })?;
        if given("InitiatorSecretEncrypted").is_some() && given("InitiatorSecret").is_none() {
            return Err(SettingsError::EncryptedSecret);
        }
        if given("HostIPStack").is_some_and(|value| matches!(value, "0" | "false")) {
            return Err(SettingsError::InternalNetwork);
        }
        let lun = given("LUN").unwrap_or("0");
        let timeout = number("Timeout", 10_000, "a number of milliseconds")?;
        Ok(Self {
            host,
            port,
            name: required("TargetName")?,
            lun: parse_lun(lun).ok_or_else(|| SettingsError::Bad {
                name: "LUN",
                value: lun.to_owned(),
                wanted: "a number up to 16383, or 'enc' and a number",
            })?,
            initiator: text("InitiatorName", LONGEST_NAME)?,
            account: account("InitiatorUsername", "InitiatorSecret")?,
            target_account: account("TargetUsername", "TargetSecret")?,
            write_split: number("WriteSplit", MOST, "a number of bytes")?.clamp(512, MOST),
            timeout: Duration::from_millis(u64::from(timeout.clamp(100, 600_000))),
        })
    }

    /// Host and port.
    pub(super) fn portal(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

/// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`; a target's redirection has a portal group behind a comma in addition.
pub(super) fn split_address(text: &str) -> Option<(String, u16)> {
    let text = text.split_once(',').map_or(text, |(address, _)| address);
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = port.map_or(Some(DEFAULT_PORT), |port| port.parse().ok())?;
    (!host.is_empty() && port != 0).then(|| (host.to_owned(), port))
}

/// A number is put into SAM's peripheral or flat form; one behind `enc` has its form already.
fn parse_lun(text: &str) -> Option<u64> {
    let parse = |text: &str| match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    match text.strip_prefix("enc") {
        Some(encoded) => parse(encoded),
        None => match parse(text)? {
            lun @ 0..=255 => Some(lun << 48),
            lun @ 256..=16383 => Some(lun << 48 | 1 << 62),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(properties: &[(&str, &'static str)]) -> Result<Target, SettingsError> {
        Target::new(|name| properties.iter().find(|(known, _)| *known == name).map(|(_, value)| *value))
    }

    #[test]
    fn properties_have_virtualboxs_defaults_and_forms() {
        let least = [("TargetAddress", "san"), ("TargetName", "iqn.x:y")];
        let found = target(&least).unwrap();
        assert_eq!((found.host.as_str(), found.port, found.lun), ("san", 3260, 0));
        assert_eq!((found.write_split, found.timeout), (262_144, Duration::from_secs(10)));
        assert!(found.account.is_none() && found.initiator.is_none());
        let all = target(&[
            ("TargetAddress", "[fe80::1]:99"),
            ("TargetName", "iqn.x:y"),
            ("LUN", "300"),
            ("InitiatorUsername", "me"),
            ("InitiatorSecret", "twelve bytes"),
            ("WriteSplit", "65536"),
            ("HostIPStack", "1"),
        ])
        .unwrap();
        assert_eq!((all.host.as_str(), all.portal().as_str()), ("fe80::1", "[fe80::1]:99"));
        assert_eq!((all.lun, all.write_split), (0x412c_0000_0000_0000, 65536));
        assert_eq!(all.account.as_ref().unwrap().name, "me");
        assert!(!format!("{all:?}").contains("twelve"));
        assert_eq!(parse_lun("enc0x1000000000000"), Some(1 << 48));
        assert_eq!((parse_lun("16384"), parse_lun("-1"), parse_lun("enc")), (None, None, None));
    }

    #[test]
    fn wrong_properties_are_named() {
        assert_eq!(target(&[("TargetName", "n")]), Err(SettingsError::Missing("TargetAddress")));
        assert_eq!(target(&[("TargetAddress", "h")]), Err(SettingsError::Missing("TargetName")));
        let with =
            |name, value| target(&[("TargetAddress", "h"), ("TargetName", "n"), (name, value)]).unwrap_err();
        assert_eq!(with("HostIPStack", "0"), SettingsError::InternalNetwork);
        assert_eq!(with("InitiatorSecretEncrypted", "x"), SettingsError::EncryptedSecret);
        assert!(matches!(with("LUN", "many"), SettingsError::Bad { name: "LUN", .. }));
        assert!(matches!(with("Timeout", "long"), SettingsError::Bad { name: "Timeout", .. }));
        for address in ["", ":1", "h:0", "h:99999", "[::1", "[::1]x"] {
            assert_eq!(split_address(address), None, "{address}");
        }
        assert_eq!(split_address("10.0.0.1:3261,1"), Some(("10.0.0.1".into(), 3261)));
    }
}
