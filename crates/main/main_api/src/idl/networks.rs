//! The networks beyond a machine: DHCP servers, NAT networks, host-only networks, the host's interfaces.

use super::interface;
use crate::enums::*;
use crate::types::ObjRef;

interface! {
    /// A DHCP server.
    IDHCPServer {
        attributes {
            Enabled: bool, rw;
            IPAddress: String, r;
            NetworkMask: String, r;
            NetworkName: String, r;
            LowerIP: String, r;
            UpperIP: String, r;
            GlobalConfig: ObjRef<IDHCPConfig>, r;
            /// Each has the interface IDHCPConfig too.
            GroupConfigs: Vec<ObjRef<IDHCPGroupConfig>>, r;
            /// Each has the interface IDHCPConfig too.
            IndividualConfigs: Vec<ObjRef<IDHCPIndividualConfig>>, r;
        }
        methods {
            SetConfiguration(IPAddress: String, networkMask: String, FromIPAddress: String, ToIPAddress: String) -> ();
            Start(trunkName: String, trunkType: String) -> ();
            Stop() -> ();
            Restart() -> ();
            /// Times are seconds since 1970.
            FindLeaseByMAC(mac: String, mac_type: i32) -> (address: String, state: String, issued: i64, expire: i64);
            GetConfig(scope: DHCPConfigScope, name: String, slot: u32, mayAdd: bool) -> (config: ObjRef<IDHCPConfig>);
        }
    }
}

interface! {
    /// Options and times for all clients, a group or one. Options are numbers; the IDL's type is DHCPOption.
    IDHCPConfig {
        attributes {
            Scope: DHCPConfigScope, r;
            /// In seconds; 0 for the default.
            MinLeaseTime: u32, rw;
            DefaultLeaseTime: u32, rw;
            MaxLeaseTime: u32, rw;
            ForcedOptions: Vec<i32>, rw;
            SuppressedOptions: Vec<i32>, rw;
        }
        methods {
            SetOption(option: i32, encoding: DHCPOptionEncoding, value: String) -> ();
            RemoveOption(option: i32) -> ();
            RemoveAllOptions() -> ();
            GetOption(option: i32) -> (value: String, encoding: DHCPOptionEncoding);
            GetAllOptions() -> (options: Vec<i32>, encodings: Vec<DHCPOptionEncoding>, values: Vec<String>);
            Remove() -> ();
        }
    }
}

interface! {
    /// Clients that match conditions.
    IDHCPGroupConfig {
        attributes {
            Name: String, rw;
            Conditions: Vec<ObjRef<IDHCPGroupCondition>>, r;
        }
        methods {
            AddCondition(inclusive: bool, conditionType: DHCPGroupConditionType, value: String) -> (condition: ObjRef<IDHCPGroupCondition>);
            RemoveAllConditions() -> ();
        }
    }
}

interface! {
    /// A condition of a group, by its place: removing one moves those behind it.
    IDHCPGroupCondition {
        attributes {
            Inclusive: bool, rw;
            Type: DHCPGroupConditionType, rw;
            Value: String, rw;
        }
        methods {
            Remove() -> ();
        }
    }
}

interface! {
    /// One client.
    IDHCPIndividualConfig {
        attributes {
            /// Of a machine's card, the address that it has now.
            MACAddress: String, r;
            /// Empty if the client is named by its address.
            MachineId: String, r;
            Slot: u32, r;
            FixedAddress: String, rw;
        }
    }
}

interface! {
    /// A NAT network.
    INATNetwork {
        attributes {
            NetworkName: String, rw;
            Enabled: bool, rw;
            Network: String, rw;
            Gateway: String, r;
            IPv6Enabled: bool, rw;
            IPv6Prefix: String, rw;
            AdvertiseDefaultIPv6RouteEnabled: bool, rw;
            NeedDhcpServer: bool, rw;
            /// `address=offset`.
            LocalMappings: Vec<String>, r;
            LoopbackIp6: i32, rw;
            /// `name:protocol:[host ip]:host port:[guest ip]:guest port`.
            PortForwardRules4: Vec<String>, r;
            PortForwardRules6: Vec<String>, r;
        }
        methods {
            /// Offset 0 removes the mapping.
            AddLocalMapping(hostid: String, offset: i32) -> ();
            AddPortForwardRule(isIpv6: bool, ruleName: String, proto: NATProtocol, hostIP: String, hostPort: u16,
                guestIP: String, guestPort: u16) -> ();
            RemovePortForwardRule(isIpv6: bool, ruleName: String) -> ();
            Start() -> ();
            Stop() -> ();
        }
    }
}

interface! {
    /// A host-only network with a DHCP range, as macOS hosts have it.
    IHostOnlyNetwork {
        attributes {
            NetworkName: String, rw;
            Enabled: bool, rw;
            NetworkMask: String, rw;
            LowerIP: String, rw;
            UpperIP: String, rw;
            Id: String, rw;
        }
    }
}

interface! {
    /// A network interface of the host.
    IHostNetworkInterface {
        attributes {
            Name: String, r;
            ShortName: String, r;
            Id: String, r;
            NetworkName: String, r;
            DHCPEnabled: bool, r;
            IPAddress: String, r;
            NetworkMask: String, r;
            IPV6Supported: bool, r;
            IPV6Address: String, r;
            IPV6NetworkMaskPrefixLength: u32, r;
            HardwareAddress: String, r;
            MediumType: HostNetworkInterfaceMediumType, r;
            Status: HostNetworkInterfaceStatus, r;
            InterfaceType: HostNetworkInterfaceType, r;
            Wireless: bool, r;
        }
        methods {
            EnableStaticIPConfig(IPAddress: String, networkMask: String) -> ();
            EnableStaticIPConfigV6(IPV6Address: String, IPV6NetworkMaskPrefixLength: u32) -> ();
            EnableDynamicIPConfig() -> ();
        }
    }
}
