//! Machine states, by VirtualBox's names (Main API, `MachineState`).

use std::fmt;

macro_rules! machine_states {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $word:literal;)*) => {
        /// What a machine is doing, as the Main API numbers it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum MachineState { $($(#[$doc])* $name = $value,)* }

        impl MachineState {
            /// The state with the Main API's number `value`.
            pub fn from_u32(value: u32) -> Option<Self> {
                match value { $($value => Some(Self::$name),)* _ => None }
            }

            /// The Main API's name, as SOAP and the settings file write it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// The word that `VBoxManage showvminfo --machinereadable` prints as `VMState`.
            pub fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }
        }
    };
}

machine_states! {
    Null = 0, "unknown";
    PoweredOff = 1, "poweroff";
    Saved = 2, "saved";
    Teleported = 3, "teleported";
    Aborted = 4, "aborted";
    AbortedSaved = 5, "aborted-saved";
    Running = 6, "running";
    Paused = 7, "paused";
    /// The VM met a condition it cannot go on from ("Guru Meditation").
    Stuck = 8, "gurumeditation";
    Teleporting = 9, "teleporting";
    LiveSnapshotting = 10, "livesnapshotting";
    Starting = 11, "starting";
    Stopping = 12, "stopping";
    Saving = 13, "saving";
    Restoring = 14, "restoring";
    TeleportingPausedVM = 15, "teleportingpausedvm";
    TeleportingIn = 16, "teleportingin";
    DeletingSnapshotOnline = 17, "deletingsnapshotlive";
    DeletingSnapshotPaused = 18, "deletingsnapshotlivepaused";
    OnlineSnapshotting = 19, "onlinesnapshotting";
    RestoringSnapshot = 20, "restoringsnapshot";
    DeletingSnapshot = 21, "deletingsnapshot";
    SettingUp = 22, "settingup";
    Snapshotting = 23, "offlinesnapshotting";
}

impl MachineState {
    /// Whether a VM process exists for the machine.
    pub fn is_online(self) -> bool {
        use MachineState as S;
        matches!(
            self,
            S::Running
                | S::Paused
                | S::Stuck
                | S::Teleporting
                | S::LiveSnapshotting
                | S::Starting
                | S::Stopping
                | S::Saving
                | S::Restoring
                | S::TeleportingPausedVM
                | S::TeleportingIn
                | S::DeletingSnapshotOnline
                | S::DeletingSnapshotPaused
                | S::OnlineSnapshotting
        )
    }
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
