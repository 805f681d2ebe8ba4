//! What virtual network cards are plugged into.
//!
//! - [`nat`]: a network behind a router that speaks to the outside through the host's sockets, by libslirp.
//! - [`switch`]: internal networks, between the machines of a user; [`process`] is the program that a network runs in, [`protocol`] what it
//!   is told, [`dhcp`] the server in it, [`host`] its way to the host's own interfaces.
//! - [`link`]: a card's end of a network that speaks by datagrams: such a process, UDP tunnels, VDE ([`generic`]).

pub mod dhcp;
pub mod generic;
pub mod host;
mod large;
pub mod link;
pub mod mac;
pub mod nat;
pub mod process;
pub mod protocol;
mod slirp;
pub mod switch;

pub use mac::Mac;
pub use nat::{Error, Guest, Nat, NatConfig, Protocol, Rule, Tftp};
