//! Vocabulary shared by every layer: guest addresses, sizes, product version, VirtualBox's result codes
//! and machine states. No behaviour of a virtual machine lives here.

pub mod result;
pub mod state;
pub mod units;
pub mod version;

pub use result::ResultCode;
pub use state::MachineState;
pub use units::{ByteSize, GuestPhys, GuestVirt, Hz, Port, Sector, SectorCount, VcpuId};
