//! Packages of machines (OVF) on their way in and out.

use super::{IProgress, interface};
use crate::enums::*;
use crate::types::ObjRef;

interface! {
    /// A package. It lives as long as the connection that made it.
    IAppliance {
        attributes {
            Path: String, r;
            /// A line for each disk of the package.
            Disks: Vec<String>, r;
            VirtualSystemDescriptions: Vec<ObjRef<IVirtualSystemDescription>>, r;
            /// The machines that an import made, by UUID.
            Machines: Vec<String>, r;
        }
        methods {
            Read(file: String) -> (progress: ObjRef<IProgress>);
            Interpret() -> ();
            ImportMachines(options: Vec<ImportOptions>) -> (progress: ObjRef<IProgress>);
            Write(format: String, options: Vec<ExportOptions>, path: String) -> (progress: ObjRef<IProgress>);
            GetWarnings() -> (warnings: Vec<String>);
            /// The ids of the passwords that an export of encrypted media needs.
            GetPasswordIds() -> (identifiers: Vec<String>);
            /// The media that are encrypted with a password, by UUID.
            GetMediumIdsForPasswordId(passwordId: String) -> (identifiers: Vec<String>);
            /// One password for each id.
            AddPasswords(identifiers: Vec<String>, passwords: Vec<String>) -> ();
        }
    }
}

interface! {
    /// One machine of a package: a list of entries, each with what the package says and what becomes of it.
    IVirtualSystemDescription {
        attributes {
            Count: u32, r;
        }
        methods {
            GetDescription() -> (types: Vec<VirtualSystemDescriptionType>, refs: Vec<String>, ovfValues: Vec<String>,
                vBoxValues: Vec<String>, extraConfigValues: Vec<String>);
            /// One value for each entry of `GetDescription`.
            SetFinalValues(enabled: Vec<bool>, vBoxValues: Vec<String>, extraConfigValues: Vec<String>) -> ();
            AddDescription(type_: VirtualSystemDescriptionType, vBoxValue: String, extraConfigValue: String) -> ();
        }
    }
}
