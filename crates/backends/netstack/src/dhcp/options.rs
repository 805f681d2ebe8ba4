//! DHCP options as users write them (RFC 2132 and later): names, numbers and the form of each value.

use std::net::Ipv4Addr;

/// The form of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Flag,
    U8,
    U16,
    U32,
    Address,
    Text,
    U16List,
    AddressList,
    /// Address and mask, or destination and router, in turn.
    AddressPairs,
    /// Bytes, as numbers or (where VirtualBox knows no better form) in hexadecimal.
    Bytes,
}

/// Why a value is not one of its option.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("DHCP option {0} is none that a server can be told to send")]
    Number(i32),
    #[error("DHCP option {code} ({name}): \"{value}\" is not {wanted}")]
    Value { code: u8, name: &'static str, value: String, wanted: &'static str },
    #[error("DHCP option {code} ({name}): the value has more than 255 bytes")]
    Long { code: u8, name: &'static str },
}

struct Known {
    code: u8,
    name: &'static str,
    form: Form,
}

macro_rules! known {
    ($($code:literal $name:ident $form:ident;)*) => {
        /// VirtualBox's names (`DHCPOption` of the Main API) and forms.
        const KNOWN: &[Known] = &[$(Known { code: $code, name: stringify!($name), form: Form::$form },)*];
    };
}

known! {
    1 SubnetMask Address;
    2 TimeOffset U32;
    3 Routers AddressList;
    4 TimeServers AddressList;
    5 NameServers AddressList;
    6 DomainNameServers AddressList;
    7 LogServers AddressList;
    8 CookieServers AddressList;
    9 LPRServers AddressList;
    10 ImpressServers AddressList;
    11 ResourseLocationServers AddressList;
    12 HostName Text;
    13 BootFileSize U16;
    14 MeritDumpFile Text;
    15 DomainName Text;
    16 SwapServer Address;
    17 RootPath Text;
    18 ExtensionPath Text;
    19 IPForwarding Flag;
    20 OptNonLocalSourceRouting Flag;
    21 PolicyFilter AddressPairs;
    22 MaxDgramReassemblySize U16;
    23 DefaultIPTTL U8;
    24 PathMTUAgingTimeout U32;
    25 PathMTUPlateauTable U16List;
    26 InterfaceMTU U16;
    27 AllSubnetsAreLocal Flag;
    28 BroadcastAddress Address;
    29 PerformMaskDiscovery Flag;
    30 MaskSupplier Flag;
    31 PerformRouterDiscovery Flag;
    32 RouterSolicitationAddress Address;
    33 StaticRoute AddressPairs;
    34 TrailerEncapsulation Flag;
    35 ARPCacheTimeout U32;
    36 EthernetEncapsulation Flag;
    37 TCPDefaultTTL U8;
    38 TCPKeepaliveInterval U32;
    39 TCPKeepaliveGarbage Flag;
    40 NISDomain Text;
    41 NISServers AddressList;
    42 NTPServers AddressList;
    43 VendorSpecificInfo Bytes;
    44 NetBIOSNameServers AddressList;
    45 NetBIOSDatagramServers AddressList;
    46 NetBIOSNodeType U8;
    47 NetBIOSScope Bytes;
    48 XWindowsFontServers AddressList;
    49 XWindowsDisplayManager AddressList;
    62 NetWareIPDomainName Text;
    63 NetWareIPInformation Bytes;
    64 NISPlusDomain Text;
    65 NISPlusServers Text;
    66 TFTPServerName Text;
    67 BootfileName Text;
    68 MobileIPHomeAgents AddressList;
    69 SMTPServers AddressList;
    70 POP3Servers AddressList;
    71 NNTPServers AddressList;
    72 WWWServers AddressList;
    73 FingerServers AddressList;
    74 IRCServers AddressList;
    75 StreetTalkServers AddressList;
    76 STDAServers AddressList;
    78 SLPDirectoryAgent Bytes;
    79 SLPServiceScope Bytes;
    119 DomainSearch Bytes;
}

/// Options that are part of the protocol: the server's own to send.
const OWN: [u8; 13] = [0, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 61, 255];

fn known(code: u8) -> Option<&'static Known> {
    KNOWN.iter().find(|option| option.code == code)
}

/// The option's number by its number or name.
pub fn number(text: &str) -> Option<u8> {
    let by_name = || KNOWN.iter().find(|option| option.name.eq_ignore_ascii_case(text)).map(|o| o.code);
    text.parse().ok().or_else(by_name)
}

/// The value as it is sent. `hex`: the text is hexadecimal bytes, with or without colons.
pub fn encode(code: i32, value: &str, hex: bool) -> Result<Vec<u8>, OptionError> {
    let number =
        u8::try_from(code).ok().filter(|code| !OWN.contains(code)).ok_or(OptionError::Number(code))?;
    let (name, form) = known(number).map_or(("unknown", Form::Bytes), |option| (option.name, option.form));
    let fail = |wanted| OptionError::Value { code: number, name, value: value.to_owned(), wanted };
    let bytes = if hex || (form == Form::Bytes && known(number).is_none()) {
        hex_bytes(value).ok_or_else(|| fail("hexadecimal bytes like 0a:1b or 0a1b"))?
    } else {
        match form {
            Form::Flag => vec![flag(value).ok_or_else(|| fail("0 or 1"))?],
            Form::U8 => vec![value.trim().parse().map_err(|_| fail("a number from 0 to 255"))?],
            Form::U16 => value
                .trim()
                .parse::<u16>()
                .map_err(|_| fail("a number from 0 to 65535"))?
                .to_be_bytes()
                .to_vec(),
            Form::U32 => {
                value.trim().parse::<u32>().map_err(|_| fail("a number of 32 bits"))?.to_be_bytes().to_vec()
            }
            Form::Address => addresses(value, |n| n == 1).ok_or_else(|| fail("an IPv4 address"))?,
            Form::AddressList => addresses(value, |n| n > 0)
                .ok_or_else(|| fail("a list of IPv4 addresses with spaces or commas between them"))?,
            Form::AddressPairs => addresses(&value.replace('/', " "), |n| n > 0 && n % 2 == 0)
                .ok_or_else(|| fail("a list of pairs of IPv4 addresses"))?,
            Form::U16List => list(value, |item| item.parse::<u16>().ok().map(u16::to_be_bytes))
                .filter(|bytes| !bytes.is_empty())
                .ok_or_else(|| fail("a list of numbers from 0 to 65535"))?,
            Form::Bytes => list(value, |item| item.parse::<u8>().ok().map(|byte| [byte]))
                .or_else(|| hex_bytes(value))
                .filter(|bytes| !bytes.is_empty())
                .ok_or_else(|| fail("a list of numbers from 0 to 255, or hexadecimal bytes"))?,
            Form::Text => value.as_bytes().to_vec(),
        }
    };
    if bytes.len() > 255 { Err(OptionError::Long { code: number, name }) } else { Ok(bytes) }
}

fn flag(text: &str) -> Option<u8> {
    match text.trim().to_ascii_lowercase().as_str() {
        "0" | "false" | "no" | "off" | "n" => Some(0),
        "1" | "true" | "yes" | "on" | "y" => Some(1),
        _ => None,
    }
}

fn list<const N: usize>(text: &str, item: impl Fn(&str) -> Option<[u8; N]>) -> Option<Vec<u8>> {
    let items = text.split([' ', '\t', ',']).filter(|part| !part.is_empty());
    items.map(item).collect::<Option<Vec<_>>>().map(|items| items.concat())
}

fn addresses(text: &str, count: impl Fn(usize) -> bool) -> Option<Vec<u8>> {
    let bytes = list(text, |item| item.parse::<Ipv4Addr>().ok().map(|a| a.octets()))?;
    count(bytes.len() / 4).then_some(bytes)
}

fn hex_bytes(text: &str) -> Option<Vec<u8>> {
    let text = text.trim();
    let byte = |part: &str| {
        let digits = part.len() <= 2 && !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    if text.contains(':') {
        return text.split(':').map(byte).collect();
    }
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| byte(text.get(at..at + 2)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_encoded_in_their_options_form() {
        for (code, value, expected) in [
            (3, "10.0.0.1", vec![10, 0, 0, 1]),
            (6, "10.0.0.1, 10.0.0.2", vec![10, 0, 0, 1, 10, 0, 0, 2]),
            (15, "example.org", b"example.org".to_vec()),
            (19, "true", vec![1]),
            (23, "64", vec![64]),
            (25, "68 296", vec![0, 68, 1, 40]),
            (26, "1400", vec![5, 120]),
            (2, "3600", vec![0, 0, 14, 16]),
            (33, "10.1.0.0 10.0.0.9", vec![10, 1, 0, 0, 10, 0, 0, 9]),
            (21, "10.1.0.0/255.255.0.0", vec![10, 1, 0, 0, 255, 255, 0, 0]),
            (43, "1 2 255", vec![1, 2, 255]),
            (224, "0a:1B:2", vec![10, 27, 2]),
            (224, "0a1b", vec![10, 27]),
        ] {
            assert_eq!(encode(code, value, false).unwrap(), expected, "{code} {value}");
        }
        assert_eq!(encode(15, "6f:72:67", true).unwrap(), b"org");
    }

    #[test]
    fn wrong_values_and_the_protocols_own_options_are_refused() {
        for (code, value) in [
            (3, ""),
            (3, "10.0.0"),
            (1, "255.0.0.0 255.0.0.0"),
            (19, "maybe"),
            (23, "256"),
            (26, "-1"),
            (33, "10.0.0.1"),
            (224, "xyz"),
            (224, "abc"),
            (51, "60"),
            (0, ""),
            (255, ""),
            (256, ""),
            (-1, ""),
        ] {
            assert!(encode(code, value, false).is_err(), "{code} {value}");
        }
        assert_eq!(
            encode(15, &"x".repeat(256), false),
            Err(OptionError::Long { code: 15, name: "DomainName" })
        );
        assert!(encode(224, "é0", true).is_err());
    }

    #[test]
    fn options_are_known_by_number_and_name() {
        assert_eq!(number("6"), Some(6));
        assert_eq!(number("domainnameservers"), Some(6));
        assert_eq!(number("224"), Some(224));
        assert_eq!(number("256"), None);
        assert_eq!(number("nonsense"), None);
    }
}
