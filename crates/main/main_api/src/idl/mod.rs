//! The interfaces of the Main API, as tables.
//!
//! Each `interface!` block is the one place where an interface's members are listed. It yields a marker type
//! (`IMachine`), a typed handle for each member (`IMachine::MemorySize`, `IMachine::SaveSettings`) that clients and
//! servers share, and a description ([`Interface`]) for introspection and generated bindings. A member that is not
//! listed does not exist, so that nothing is announced which no one serves.
//!
//! Members carry the Main API's names with a capital first letter. Where a signature differs from VirtualBox 7.0's IDL,
//! the interface's comment says so; objects that COM places in the client (ISession) are made by
//! [`IClientSupport::CreateSession`] here.

mod appliance;
mod console;
mod devices;
mod machine;
mod networks;
mod root;
mod storage;

pub use appliance::*;
pub use console::*;
pub use devices::*;
pub use machine::*;
pub use networks::*;
pub use root::*;
pub use storage::*;

use crate::types::Interface;

/// Prefix of the D-Bus interface names.
pub const INTERFACE_PREFIX: &str = "org.virtualbox.";

macro_rules! interface {
    (@writable r) => { false };
    (@writable rw) => { true };
    (
        $(#[$doc:meta])*
        $name:ident {
            $(attributes { $($(#[$adoc:meta])* $attr:ident: $aty:ty, $access:ident;)* })?
            $(methods { $($(#[$mdoc:meta])* $method:ident($($arg:ident: $argty:ty),* $(,)?) -> ($($ret:ident: $retty:ty),*);)* })?
            $(signals { $($(#[$sdoc:meta])* $signal:ident($($sarg:ident: $sargty:ty),* $(,)?);)* })?
        }
    ) => {
        $(#[$doc])*
        pub struct $name;

        impl $crate::types::InterfaceType for $name {
            const NAME: &'static str = stringify!($name);
        }

        #[allow(non_upper_case_globals)]
        impl $name {
            $($($(#[$adoc])* pub const $attr: $crate::types::Attr<$name, $aty> =
                $crate::types::Attr::new(stringify!($attr));)*)?
            $($($(#[$mdoc])* pub const $method: $crate::types::Method<$name, ($($argty,)*), ($($retty,)*)> =
                $crate::types::Method::new(stringify!($method));)*)?
            $($($(#[$sdoc])* pub const $signal: $crate::types::Signal<$name, ($($sargty,)*)> =
                $crate::types::Signal::new(stringify!($signal));)*)?

            /// The table of this interface.
            pub const INTERFACE: $crate::types::Interface = $crate::types::Interface {
                name: stringify!($name),
                dbus_name: concat!("org.virtualbox.", stringify!($name)),
                attributes: &[$($($crate::types::AttrDesc {
                    name: stringify!($attr),
                    ty: <$aty as $crate::types::ApiType>::TY,
                    writable: interface!(@writable $access),
                },)*)?],
                methods: &[$($($crate::types::MethodDesc {
                    name: stringify!($method),
                    args: &[$((stringify!($arg), <$argty as $crate::types::ApiType>::TY),)*],
                    returns: &[$((stringify!($ret), <$retty as $crate::types::ApiType>::TY),)*],
                },)*)?],
                signals: &[$($($crate::types::SignalDesc {
                    name: stringify!($signal),
                    args: &[$((stringify!($sarg), <$sargty as $crate::types::ApiType>::TY),)*],
                },)*)?],
            };
        }
    };
}
pub(crate) use interface;

macro_rules! interface_list {
    ($($name:ident)*) => {
        /// Every interface.
        pub static ALL: &[Interface] = &[$($name::INTERFACE,)*];
    };
}

interface_list! {
    IClientSupport IVMProcessControl IVMProcess IVirtualBox ISystemProperties IHost IGuestOSType IProgress
    IVirtualBoxErrorInfo IEventSource ISession
    IMachine ISnapshot
    IAppliance IVirtualSystemDescription
    INetworkAdapter INATEngine ISerialPort IParallelPort IAudioSettings IAudioAdapter IGraphicsAdapter IBIOSSettings
    IVRDEServer IUSBController IUSBDeviceFilters IUSBDeviceFilter ISharedFolder IBandwidthControl IBandwidthGroup
    IRecordingSettings IRecordingScreenSettings ITrustedPlatformModule INvramStore IGuestDebugControl
    IMedium IMediumAttachment IStorageController
    IDHCPServer IDHCPConfig IDHCPGroupConfig IDHCPGroupCondition IDHCPIndividualConfig INATNetwork IHostOnlyNetwork
    IHostNetworkInterface
    IConsole IKeyboard IMouse IDisplay IMachineDebugger
}

/// The interface with the D-Bus name `dbus_name`.
pub fn by_dbus_name(dbus_name: &str) -> Option<&'static Interface> {
    ALL.iter().find(|i| i.dbus_name == dbus_name)
}

/// The interface that the Main API calls `name`.
pub fn by_name(name: &str) -> Option<&'static Interface> {
    ALL.iter().find(|i| i.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::types::Ty;

    fn object_names(ty: Ty, names: &mut HashSet<&'static str>) {
        match ty {
            Ty::Object(name) => {
                names.insert(name);
            }
            Ty::Array(inner) => object_names(*inner, names),
            _ => {}
        }
    }

    #[test]
    fn every_interface_that_is_referred_to_is_in_the_list() {
        let listed: HashSet<_> = ALL.iter().map(|i| i.name).collect();
        assert_eq!(listed.len(), ALL.len(), "an interface is listed twice");
        let mut used = HashSet::new();
        for interface in ALL {
            for attr in interface.attributes {
                object_names(attr.ty, &mut used);
            }
            for method in interface.methods {
                for (_, ty) in method.args.iter().chain(method.returns) {
                    object_names(*ty, &mut used);
                }
            }
        }
        let missing: Vec<_> = used.difference(&listed).collect();
        assert!(missing.is_empty(), "not in the list: {missing:?}");
    }
}
