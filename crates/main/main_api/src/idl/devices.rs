//! The parts of a machine that are objects of their own.

use super::interface;
use crate::enums::*;
use crate::types::ObjRef;

interface! {
    /// A network card.
    INetworkAdapter {
        attributes {
            AdapterType: NetworkAdapterType, rw;
            Slot: u32, r;
            Enabled: bool, rw;
            /// Twelve upper-case hexadecimal digits; writing an empty text makes a new address.
            MACAddress: String, rw;
            AttachmentType: NetworkAttachmentType, rw;
            BridgedInterface: String, rw;
            HostOnlyInterface: String, rw;
            HostOnlyNetwork: String, rw;
            InternalNetwork: String, rw;
            NATNetwork: String, rw;
            GenericDriver: String, rw;
            CloudNetwork: String, rw;
            CableConnected: bool, rw;
            /// In kbit/s; 0 for the default.
            LineSpeed: u32, rw;
            PromiscModePolicy: NetworkAdapterPromiscModePolicy, rw;
            TraceEnabled: bool, rw;
            TraceFile: String, rw;
            NATEngine: ObjRef<INATEngine>, r;
            BootPriority: u32, rw;
            /// The name of the group, or empty. The IDL's type is IBandwidthGroup.
            BandwidthGroup: String, rw;
        }
        methods {
            GetProperty(key: String) -> (value: String);
            SetProperty(key: String, value: String) -> ();
            GetProperties() -> (names: Vec<String>, values: Vec<String>);
        }
    }
}

interface! {
    /// The NAT engine of a network card.
    INATEngine {
        attributes {
            Network: String, rw;
            HostIP: String, rw;
            TFTPPrefix: String, rw;
            TFTPBootFile: String, rw;
            TFTPNextServer: String, rw;
            DNSPassDomain: bool, rw;
            DNSProxy: bool, rw;
            DNSUseHostResolver: bool, rw;
            /// `name,protocol,host ip,host port,guest ip,guest port`, protocol 0 for UDP and 1 for TCP, sorted by name.
            Redirects: Vec<String>, r;
            LocalhostReachable: bool, rw;
            ForwardBroadcast: bool, rw;
            AliasLog: bool, rw;
            AliasProxyOnly: bool, rw;
            AliasUseSamePorts: bool, rw;
        }
        methods {
            SetNetworkSettings(mtu: u32, sockSnd: u32, sockRcv: u32, tcpWndSnd: u32, tcpWndRcv: u32) -> ();
            GetNetworkSettings() -> (mtu: u32, sockSnd: u32, sockRcv: u32, tcpWndSnd: u32, tcpWndRcv: u32);
            AddRedirect(name: String, proto: NATProtocol, hostIP: String, hostPort: u16, guestIP: String, guestPort: u16) -> ();
            RemoveRedirect(name: String) -> ();
        }
    }
}

interface! {
    /// A serial port.
    ISerialPort {
        attributes {
            Slot: u32, r;
            Enabled: bool, rw;
            IOAddress: u32, rw;
            IRQ: u32, rw;
            HostMode: PortMode, rw;
            Server: bool, rw;
            Path: String, rw;
            UartType: UartType, rw;
        }
    }
}

interface! {
    /// A parallel port.
    IParallelPort {
        attributes {
            Slot: u32, r;
            Enabled: bool, rw;
            IOAddress: u32, rw;
            IRQ: u32, rw;
            Path: String, rw;
        }
    }
}

interface! {
    /// Sound.
    IAudioSettings {
        attributes {
            Adapter: ObjRef<IAudioAdapter>, r;
        }
    }
}

interface! {
    /// The sound card.
    IAudioAdapter {
        attributes {
            Enabled: bool, rw;
            EnabledIn: bool, rw;
            EnabledOut: bool, rw;
            AudioController: AudioControllerType, rw;
            AudioCodec: AudioCodecType, rw;
            AudioDriver: AudioDriverType, rw;
        }
    }
}

interface! {
    /// The graphics card.
    IGraphicsAdapter {
        attributes {
            GraphicsControllerType: GraphicsControllerType, rw;
            /// In MB.
            VRAMSize: u32, rw;
            Accelerate3DEnabled: bool, rw;
            Accelerate2DVideoEnabled: bool, rw;
            MonitorCount: u32, rw;
        }
    }
}

interface! {
    /// The firmware's settings.
    IBIOSSettings {
        attributes {
            LogoFadeIn: bool, rw;
            LogoFadeOut: bool, rw;
            /// In milliseconds.
            LogoDisplayTime: u32, rw;
            LogoImagePath: String, rw;
            BootMenuMode: BIOSBootMenuMode, rw;
            ACPIEnabled: bool, rw;
            IOAPICEnabled: bool, rw;
            APICMode: APICMode, rw;
            /// In milliseconds, added to the host's clock.
            TimeOffset: i64, rw;
            PXEDebugEnabled: bool, rw;
            SMBIOSUuidLittleEndian: bool, rw;
        }
    }
}

interface! {
    /// The remote display.
    IVRDEServer {
        attributes {
            Enabled: bool, rw;
            AuthType: AuthType, rw;
            /// In milliseconds.
            AuthTimeout: u32, rw;
            AllowMultiConnection: bool, rw;
            ReuseSingleConnection: bool, rw;
            VRDEExtPack: String, rw;
            AuthLibrary: String, rw;
            VRDEProperties: Vec<String>, r;
        }
        methods {
            SetVRDEProperty(key: String, value: String) -> ();
            GetVRDEProperty(key: String) -> (value: String);
        }
    }
}

interface! {
    /// A USB controller.
    IUSBController {
        attributes {
            Name: String, rw;
            Type: USBControllerType, r;
            /// As BCD, 0x0200 for 2.0.
            USBStandard: u16, r;
        }
    }
}

interface! {
    /// The filters by which USB devices of the host come to the machine.
    IUSBDeviceFilters {
        attributes {
            DeviceFilters: Vec<ObjRef<IUSBDeviceFilter>>, r;
        }
        methods {
            /// Makes a filter at `position` at once (the IDL makes and inserts in two calls).
            CreateDeviceFilter(position: u32, name: String) -> (filter: ObjRef<IUSBDeviceFilter>);
            RemoveDeviceFilter(position: u32) -> ();
        }
    }
}

interface! {
    /// A USB filter.
    IUSBDeviceFilter {
        attributes {
            Name: String, rw;
            Active: bool, rw;
            VendorId: String, rw;
            ProductId: String, rw;
            Revision: String, rw;
            Manufacturer: String, rw;
            Product: String, rw;
            SerialNumber: String, rw;
            Port: String, rw;
            Remote: String, rw;
            MaskedInterfaces: u32, rw;
        }
    }
}

interface! {
    /// A folder of the host that the guest may use.
    ISharedFolder {
        attributes {
            Name: String, r;
            HostPath: String, r;
            Accessible: bool, r;
            Writable: bool, rw;
            AutoMount: bool, rw;
            AutoMountPoint: String, rw;
        }
    }
}

interface! {
    /// The groups that share a bandwidth.
    IBandwidthControl {
        attributes {
            NumGroups: u32, r;
        }
        methods {
            CreateBandwidthGroup(name: String, groupType: BandwidthGroupType, maxBytesPerSec: i64) -> ();
            DeleteBandwidthGroup(name: String) -> ();
            GetBandwidthGroup(name: String) -> (group: ObjRef<IBandwidthGroup>);
            GetAllBandwidthGroups() -> (groups: Vec<ObjRef<IBandwidthGroup>>);
        }
    }
}

interface! {
    /// A bandwidth group.
    IBandwidthGroup {
        attributes {
            Name: String, r;
            Type: BandwidthGroupType, r;
            MaxBytesPerSec: i64, rw;
        }
    }
}

interface! {
    /// Recording of the screens.
    IRecordingSettings {
        attributes {
            Enabled: bool, rw;
            Screens: Vec<ObjRef<IRecordingScreenSettings>>, r;
        }
        methods {
            GetScreenSettings(screenId: u32) -> (recordScreenSettings: ObjRef<IRecordingScreenSettings>);
        }
    }
}

interface! {
    /// Recording of one screen.
    IRecordingScreenSettings {
        attributes {
            Id: u32, r;
            Enabled: bool, rw;
            Filename: String, rw;
            /// In seconds; 0 for no limit.
            MaxTime: u32, rw;
            /// In MB; 0 for no limit.
            MaxFileSize: u32, rw;
            Options: String, rw;
            VideoWidth: u32, rw;
            VideoHeight: u32, rw;
            /// In kbit/s.
            VideoRate: u32, rw;
            VideoFPS: u32, rw;
        }
    }
}

interface! {
    /// The TPM.
    ITrustedPlatformModule {
        attributes {
            Type: TpmType, rw;
            Location: String, rw;
        }
    }
}

interface! {
    /// The firmware's non-volatile memory.
    INvramStore {
        attributes {
            NonVolatileStorageFile: String, r;
        }
    }
}

interface! {
    /// How a debugger reaches the guest.
    IGuestDebugControl {
        attributes {
            DebugProvider: GuestDebugProvider, rw;
            DebugIoProvider: GuestDebugIoProvider, rw;
            DebugAddress: String, rw;
            DebugPort: u32, rw;
        }
    }
}
