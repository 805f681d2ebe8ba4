//! Carries requests out through the Main API.

use main_api::Client;

use crate::FAILURE;
use crate::global::Global;
use crate::parse::Request;
use crate::print::error::Stderr;

/// Carries out `request`; the exit status.
pub fn run(_request: Request, _global: &Global, stderr: &mut Stderr) -> u8 {
    match Client::connect() {
        Ok(_) => stderr.error("This command is understood, but cannot be carried out in this version"),
        Err(error) => {
            stderr.error("Failed to create the VirtualBox object!");
            stderr.error(&format!("{error}\nDetails: {}", error.details()));
        }
    }
    FAILURE
}
