//! `VBoxManage`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vboxmanage::main(std::env::args_os().skip(1).collect())
}
