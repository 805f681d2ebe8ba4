//! Settings versions: the `version` attribute of the root element, such as `1.19-linux`.

use std::fmt;

/// The format of a settings file. Every version since 1.3 counts in the minor number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SettingsVersion(u16);

macro_rules! versions {
    ($($(#[$doc:meta])* $name:ident = $minor:literal;)*) => {
        impl SettingsVersion { $($(#[$doc])* pub const $name: Self = Self($minor);)* }
    };
}

versions! {
    /// VirtualBox 2.2 and 3.0; nothing older is read.
    V1_7 = 7;
    V1_8 = 8;
    /// VirtualBox 3.1.
    V1_9 = 9;
    /// VirtualBox 3.2; nothing older is written.
    V1_10 = 10;
    /// VirtualBox 4.0.
    V1_11 = 11;
    /// VirtualBox 4.1. New files start here and rise to what their settings need.
    V1_12 = 12;
    /// VirtualBox 4.2.
    V1_13 = 13;
    /// VirtualBox 4.3.
    V1_14 = 14;
    /// VirtualBox 5.0.
    V1_15 = 15;
    /// VirtualBox 5.1 and 5.2.
    V1_16 = 16;
    /// VirtualBox 6.0.
    V1_17 = 17;
    /// VirtualBox 6.1.
    V1_18 = 18;
    /// VirtualBox 7.0.
    V1_19 = 19;
}

impl SettingsVersion {
    /// The newest version known.
    pub const NEWEST: Self = Self::V1_19;

    /// The version that the attribute `text` names, known or not, without its platform.
    pub fn parse(text: &str) -> Option<(u32, u32)> {
        let number = text.split('-').next()?;
        let (major, minor) = number.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// The version `major.minor`, if it is one of those that are read.
    pub fn known(major: u32, minor: u32) -> Option<Self> {
        let version = Self(u16::try_from(minor).ok()?);
        (major == 1 && (Self::V1_7..=Self::NEWEST).contains(&version)).then_some(version)
    }

    /// The attribute's text on this platform: `1.19-linux`.
    pub fn attribute(self) -> String {
        format!("{self}-linux")
    }
}

impl fmt::Display for SettingsVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1.{}", self.0)
    }
}
