//! What may happen to a running machine that its user should know: the ids of [`crate::idl::IEventSource::OnRuntimeError`].

/// The guest has told its hypervisor that it has crashed (Hyper-V's crash registers: a stop error of Windows, a panic of Linux). It may go on to
/// write its memory to disk or to reset. VirtualBox writes this to VBox.log only; the id is ours.
pub const GUEST_CRASH: &str = "GIMHvGuestCrash";

/// The password of an encrypted disk is missing: the machine is paused until it comes. VirtualBox's id.
pub const KEY_MISSING: &str = "DrvVD_DEKMISSING";
