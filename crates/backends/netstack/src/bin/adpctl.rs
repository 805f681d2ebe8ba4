//! `VBoxNetAdpCtl`: makes, removes and sets up host-only interfaces. A program of its own, so that the capability it needs can be given to
//! it alone. The command line is VirtualBox's.

use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;

use netstack::host::{self, HostError};

const USAGE: &str = "\
Usage: VBoxNetAdpCtl <adapter> <address> ([netmask <address>] | remove)
     | VBoxNetAdpCtl <adapter> <address>/<length>
     | VBoxNetAdpCtl [<adapter>] add
     | VBoxNetAdpCtl <adapter> remove

It needs the capability cap_net_admin:  setcap cap_net_admin+ep VBoxNetAdpCtl
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["add"] => host::create_host_only().map(|name| println!("{name}")),
        [name, "remove"] => host::remove_host_only(name),
        [name, address, rest @ ..] => match setting(address, rest) {
            Some(setting) => setting.apply(name),
            None => return usage(),
        },
        _ => return usage(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::error::Error as _;
            let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
            eprintln!("VBoxNetAdpCtl: error: {error}{cause}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprint!("{USAGE}");
    ExitCode::from(2)
}

enum Setting {
    V4(Ipv4Addr, Ipv4Addr),
    V6(std::net::Ipv6Addr, u32),
}

fn setting(address: &str, rest: &[&str]) -> Option<Setting> {
    let (address, length) = match address.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u32>().ok()?)),
        None => (address, None),
    };
    match (address.parse().ok()?, rest) {
        (IpAddr::V4(_), ["remove"]) => Some(Setting::V4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED)),
        (IpAddr::V4(address), ["netmask", mask]) if length.is_none() => {
            Some(Setting::V4(address, mask.parse().ok()?))
        }
        (IpAddr::V4(address), []) => {
            let length = length.unwrap_or(24);
            (length <= 32)
                .then(|| Setting::V4(address, Ipv4Addr::from(u32::MAX.checked_shl(32 - length).unwrap_or(0))))
        }
        (IpAddr::V6(address), []) => {
            Some(Setting::V6(address, length.unwrap_or(64))).filter(|_| length <= Some(128))
        }
        _ => None,
    }
}

impl Setting {
    fn apply(self, name: &str) -> Result<(), HostError> {
        match self {
            Self::V4(address, mask) => host::set_ipv4(name, address, mask),
            Self::V6(address, prefix) => host::set_ipv6(name, address, prefix),
        }
    }
}
