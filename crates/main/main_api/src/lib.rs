//! The Main API: VirtualBox's object model over D-Bus on a private socket.
//!
//! # For clients
//!
//! ```no_run
//! use main_api::enums::{LockType, SessionState};
//! use main_api::idl::{IBIOSSettings, IMachine, INetworkAdapter, IProgress, IVirtualBox};
//! use main_api::{ApiError, Client};
//!
//! fn main() -> Result<(), ApiError> {
//!     let client = Client::connect()?;                       // starts VBoxSVC if none runs
//!     let vbox = client.virtual_box();
//!     println!("{}", vbox.read(IVirtualBox::Version)?);      // attributes are typed: this is a String
//!
//!     // Lists in one round trip.
//!     let machines = vbox.read(IVirtualBox::Machines)?;
//!     for m in client.read_many(&machines, &["Name", "Id"])? {
//!         println!("{:?} {{{}}}", m.read(IMachine::Name)?, m.read(IMachine::Id)?);
//!     }
//!
//!     // Methods take a tuple and return a value, a tuple, or ().
//!     let machine = client.find_machine("my machine")?;
//!
//!     // Everything that showvminfo needs, in one round trip.
//!     let tree = machine.tree()?;
//!     let this = machine.reference();
//!     println!("{} MB", tree.read(&this, IMachine::MemorySize)?);
//!     let bios = tree.read(&this, IMachine::BIOSSettings)?;
//!     println!("{}", tree.read(&bios, IBIOSSettings::ACPIEnabled)?);
//!     for adapter in tree.read(&this, IMachine::NetworkAdapters)? {
//!         println!("{}", tree.read(&adapter, INetworkAdapter::MACAddress)?);
//!     }
//!
//!     // Changing settings: write lock, the session's own machine, save.
//!     let session = client.lock_machine(&machine, LockType::Write)?;
//!     let mutable = session.machine()?;
//!     mutable.write(IMachine::MemorySize, 512)?;
//!     mutable.object(IMachine::BIOSSettings)?.write(IBIOSSettings::ACPIEnabled, true)?;
//!     mutable.call(IMachine::SaveSettings, ())?;
//!     drop(session);                                         // unlocks
//!
//!     // Starting, and the console of a running machine.
//!     let session = client.create_session()?;
//!     let progress =
//!         machine.call(IMachine::LaunchVMProcess, (session.reference(), "headless".into(), vec![]))?;
//!     machine.at(progress).wait(|state| eprint!("\r{}%", state.percent))?;
//!     let console = session.console()?;                      // after a launch the session has a shared lock
//!     console.call(main_api::idl::IConsole::PowerButton, ())?;
//!     Ok(())
//! }
//! ```
//!
//! - Every name is a constant of its interface's marker type in [`idl`], so that a wrong name or type does not compile.
//!   Enumerations are in [`enums`].
//! - Object references ([`ObjRef`]) are paths; `client.at(reference)` makes a [`Proxy`] of one. `ObjRef::is_null`
//!   tells the null object.
//! - Paths of files must be absolute: the service has another working directory.
//! - An [`ApiError`] has VirtualBox's code, text, component and interface; [`ApiError::details`] is the line that
//!   `VBoxManage` prints as `Details`.
//! - A session locked with [`enums::LockType::Shared`] on a machine that another client has locked for writing, or whose
//!   VM runs, works on that lock's machine; the machine of a running VM can change only what VirtualBox lets change at run time.
//! - A machine made by `CreateMachine` or `OpenMachine` is mutable without a session until it is registered; it belongs to the
//!   connection that made it. `SaveSettings` writes its file.
//!
//! # For VM processes
//!
//! See [`vm_process`].
//!
//! # For services
//!
//! [`server`] turns the tables and a [`server::Service`] into a D-Bus peer. [`ipc`] says how processes meet,
//! [`paths`] which objects there are, [`liveness`] how the death of a VM process is known for certain.

pub mod client;
pub mod cpu_profiles;
pub mod enums;
pub mod error;
pub mod idl;
pub mod ipc;
pub mod liveness;
pub mod paths;
pub mod progress;
pub mod runtime_error;
pub mod server;
pub mod types;
pub mod vm_process;

pub use client::{Client, Proxy, Session, Tree};
pub use error::{ApiError, ApiResult};
pub use types::ObjRef;
