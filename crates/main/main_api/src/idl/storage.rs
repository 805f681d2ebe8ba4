//! Media, controllers and what connects them.

use super::{IProgress, interface};
use crate::enums::*;
use crate::types::ObjRef;

interface! {
    /// A medium: an image of a hard disk, DVD or floppy, or a drive of the host.
    IMedium {
        attributes {
            Id: String, r;
            Description: String, rw;
            State: MediumState, r;
            Variant: Vec<MediumVariant>, r;
            Location: String, rw;
            Name: String, r;
            DeviceType: DeviceType, r;
            HostDrive: bool, r;
            /// Physical size in bytes.
            Size: i64, r;
            Format: String, r;
            Type: MediumType, rw;
            Parent: ObjRef<IMedium>, r;
            Children: Vec<ObjRef<IMedium>>, r;
            Base: ObjRef<IMedium>, r;
            ReadOnly: bool, r;
            /// In bytes.
            LogicalSize: i64, r;
            AutoReset: bool, rw;
            LastAccessError: String, r;
            MachineIds: Vec<String>, r;
        }
        methods {
            Close() -> ();
            RefreshState() -> (state: MediumState);
            GetSnapshotIds(machineId: String) -> (snapshotIds: Vec<String>);
            GetProperty(name: String) -> (value: String);
            SetProperty(name: String, value: String) -> ();
            GetProperties(names: String) -> (returnNames: Vec<String>, returnValues: Vec<String>);
            SetProperties(names: Vec<String>, values: Vec<String>) -> ();
            /// Changes UUIDs in the file of a medium that nothing uses; an empty one is made up, or nil for the parent's.
            SetIds(setImageId: bool, imageId: String, setParentId: bool, parentId: String) -> ();
            CreateDiffStorage(target: ObjRef<IMedium>, variant: Vec<MediumVariant>) -> (progress: ObjRef<IProgress>);
            CloneTo(target: ObjRef<IMedium>, variant: Vec<MediumVariant>, parent: ObjRef<IMedium>) -> (progress: ObjRef<IProgress>);
            ResizeAndCloneTo(target: ObjRef<IMedium>, logicalSize: i64, variant: Vec<MediumVariant>, parent: ObjRef<IMedium>)
                -> (progress: ObjRef<IProgress>);
            Compact() -> (progress: ObjRef<IProgress>);
            Resize(logicalSize: i64) -> (progress: ObjRef<IProgress>);
            MoveTo(location: String) -> (progress: ObjRef<IProgress>);
            CreateBaseStorage(logicalSize: i64, variant: Vec<MediumVariant>) -> (progress: ObjRef<IProgress>);
            DeleteStorage() -> (progress: ObjRef<IProgress>);
            Reset() -> (progress: ObjRef<IProgress>);
            /// Encrypts, encrypts anew or decrypts the medium with those below it. Empty texts are what is not given.
            ChangeEncryption(currentPassword: String, cipher: String, newPassword: String, newPasswordId: String)
                -> (progress: ObjRef<IProgress>);
            GetEncryptionSettings() -> (cipher: String, passwordId: String);
            CheckEncryptionPassword(password: String) -> ();
        }
    }
}

interface! {
    /// A device slot of a storage controller that is in use.
    IMediumAttachment {
        attributes {
            /// Null for an empty drive.
            Medium: ObjRef<IMedium>, r;
            /// The name of the controller.
            Controller: String, r;
            Port: i32, r;
            Device: i32, r;
            Type: DeviceType, r;
            Passthrough: bool, r;
            TemporaryEject: bool, r;
            IsEjected: bool, r;
            NonRotational: bool, r;
            Discard: bool, r;
            HotPluggable: bool, r;
            /// The name of the group, or empty. The IDL's type is IBandwidthGroup.
            BandwidthGroup: String, r;
        }
    }
}

interface! {
    /// A storage controller.
    IStorageController {
        attributes {
            Name: String, rw;
            MaxDevicesPerPortCount: u32, r;
            MinPortCount: u32, r;
            MaxPortCount: u32, r;
            Instance: u32, rw;
            PortCount: u32, rw;
            Bus: StorageBus, r;
            ControllerType: StorageControllerType, rw;
            UseHostIOCache: bool, rw;
            Bootable: bool, r;
        }
    }
}
