//! The version that clients see. Tools choose their driver by it: Vagrant 2.3.4 knows up to 7.0, and takes
//! `7.0.0` for a special case, hence a later patch level.

/// The VirtualBox version whose interface this is, three numbers.
pub const VERSION: &str = "7.0.20";
/// The revision that follows `r` in `VBoxManage --version`.
pub const REVISION: u32 = 163906;
/// `IVirtualBox::APIVersion`.
pub const API_VERSION: &str = "7_0";
/// The program's own name.
pub const PRODUCT: &str = "Boxwood";
