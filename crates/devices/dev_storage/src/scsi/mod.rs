//! SCSI: disks and CD drives at a bus, and the host adapters that guests reach them by.
//!
//! [`bus`] has the targets of an adapter and their commands; [`unit`] knows what the commands mean, [`cd`] those of CD drives, which
//! ATAPI shares. An adapter takes commands from its guest in its own way, and gives their ends back in its own way.
//!
//! **Saved state.** Saving requires that all requests have completed (the machine stops the vCPUs and drains its media first).

pub(crate) mod bus;
pub mod buslogic;
pub(crate) mod cd;
pub(crate) mod inquiry;
pub mod mpt;
pub(crate) mod sense;
pub(crate) mod sg;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod unit;
pub mod virtio;

use pdm::connector::Medium;

use crate::ide::Drive;

/// Told when a guest ejects a disc. Called with the controller's lock held: it may only queue.
pub trait EjectSink: Send + Sync {
    /// The medium of the drive at `target` has been let go.
    fn ejected(&self, target: usize);
}

/// Why a drive or disc cannot be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("the SCSI controller has no port {0}")]
    NoTarget(usize),
    #[error("there is no CD drive at SCSI port {0}")]
    NoDrive(usize),
    #[error("SCSI port {0} has a drive already")]
    Taken(usize),
    #[error("the guest has locked the disc in the drive")]
    Locked,
}

/// What the host does with any SCSI controller.
pub trait Controller: Send {
    /// Puts another disc into a CD drive, or takes it out. Unless `force`, a disc the guest has locked stays, and the guest is told
    /// that somebody pressed the eject button.
    fn set_medium(&mut self, target: usize, medium: Medium, force: bool) -> Result<(), TargetError>;

    /// Plugs a drive into an empty place. The guest is told where the controller has a way to.
    fn attach(&mut self, target: usize, drive: Drive) -> Result<(), TargetError>;

    /// Pulls a drive out. Requests under way reach its medium still; their commands end as those of a missing drive.
    fn detach(&mut self, target: usize) -> Result<(), TargetError>;

    /// Whether no request is with a medium.
    fn is_idle(&self) -> bool;
}
