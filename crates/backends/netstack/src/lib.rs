//! What virtual network cards are plugged into. So far NAT: a network of the machine's own behind a router that speaks to the
//! outside through the host's sockets, by libslirp.

pub mod nat;
mod slirp;

pub use nat::{Error, Guest, Nat, NatConfig, Protocol, Rule, Tftp};
