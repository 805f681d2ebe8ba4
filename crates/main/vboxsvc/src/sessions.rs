//! Sessions and the locks that clients take with them.

use std::time::Duration;

use main_api::enums::{LockType, SessionState, SessionType};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::IEventSource;
use main_api::server::Peer;
use parking_lot::MutexGuard;
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::svc::{Held, Lock, Owner, State, Svc};
use crate::view::gone;

/// How long a lock request waits for a VM process to exit or to come up.
const TRANSITION_LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn busy_session() -> ApiError {
    ApiError::new(ResultCode::InvalidObjectState, "The given session is busy").on("IMachine")
}

pub(crate) fn already_locked(name: &str) -> ApiError {
    ApiError::new(
        ResultCode::InvalidObjectState,
        format!("The machine '{name}' is already locked for a session (or being unlocked)"),
    )
    .on("IMachine")
}

impl Svc {
    /// IMachine::lockMachine. Waits while the machine's VM process comes up or goes.
    pub(crate) fn lock_machine(
        &self,
        peer: &Peer,
        machine: Uuid,
        session: u32,
        lock: LockType,
    ) -> ApiResult<()> {
        let mut state = self.state.lock();
        check_free_session(&state, peer, session)?;
        if !matches!(lock, LockType::Shared | LockType::Write) {
            let text = "The lock type VM is for VM processes, which register with the service instead";
            return Err(ApiError::invalid_arg(text));
        }
        self.wait_for(&mut state, TRANSITION_LIMIT, |s| {
            !s.machines.get(&machine).is_some_and(|m| match m.session_state() {
                SessionState::Unlocking => true,
                SessionState::Spawning => lock == LockType::Shared,
                _ => false,
            })
        });
        check_free_session(&state, peer, session)?;
        let m = state.machine_mut(machine)?;
        if let Some(error) = &m.access_error {
            return Err(error.clone());
        }
        match &m.lock {
            Lock::None => {
                let copy = m.settings.clone();
                let name = session_name(&state, session);
                let held = Held { owner: Owner::Session(session), copy, name, pid: peer.pid };
                state.machine_mut(machine)?.lock = Lock::Held(held);
                attach(&mut state, session, machine, SessionType::WriteLock)?;
                state.emit(IEventSource::OnSessionStateChanged, (machine.to_string(), SessionState::Locked));
                self.changed.notify_all();
                Ok(())
            }
            Lock::Held(_) if lock == LockType::Shared && m.session_state() == SessionState::Locked => {
                attach(&mut state, session, machine, SessionType::Shared)
            }
            Lock::Spawning { .. } => Err(ApiError::new(
                ResultCode::InvalidObjectState,
                format!("The machine '{}' already has a lock request pending", m.display_name()),
            )),
            Lock::Held(_) => Err(already_locked(&m.display_name())),
        }
    }

    /// ISession::unlockMachine.
    pub(crate) fn unlock_session(&self, session: u32) -> ApiResult<()> {
        let mut state = self.state.lock();
        if state.sessions.get(&session).ok_or_else(gone)?.state != SessionState::Locked {
            return Err(ApiError::new(
                ResultCode::Unexpected,
                "The session is not locked (session state: Unlocked)",
            ));
        }
        self.release(&mut state, session);
        Ok(())
    }

    pub(crate) fn drop_session(&self, peer: &Peer, session: u32) {
        let mut state = self.state.lock();
        if state.sessions.get(&session).is_some_and(|s| s.peer == peer.id) {
            self.release(&mut state, session);
            state.sessions.remove(&session);
        }
    }

    /// Ends a session's hold on its machine. A write lock takes the shared sessions of the same machine along.
    fn release(&self, state: &mut MutexGuard<'_, State>, session: u32) {
        let Some(id) = detach(state, session) else { return };
        let Some(machine) = state.machines.get_mut(&id) else { return };
        if let Lock::Held(Held { owner: Owner::Session(owner), .. }) = machine.lock
            && owner == session
        {
            machine.lock = Lock::None;
            detach_all(state, id);
            state.emit(IEventSource::OnSessionStateChanged, (id.to_string(), SessionState::Unlocked));
        }
        self.changed.notify_all();
    }

    /// The connection of `peer` is gone, and with it everything that it held.
    pub(crate) fn drop_peer(&self, state: &mut MutexGuard<'_, State>, peer: u64) {
        let sessions: Vec<u32> =
            state.sessions.iter().filter(|(_, s)| s.peer == peer).map(|(n, _)| *n).collect();
        for session in sessions {
            self.release(state, session);
            state.sessions.remove(&session);
        }
        state.unregistered.retain(|_, (owner, _)| *owner != peer);
        state.appliances.retain(|_, a| a.peer != peer);
        self.vm_peer_gone(state, peer);
    }
}

fn check_free_session(state: &State, peer: &Peer, session: u32) -> ApiResult<()> {
    let session = state.sessions.get(&session).filter(|s| s.peer == peer.id).ok_or_else(gone)?;
    if session.state != SessionState::Unlocked {
        return Err(busy_session());
    }
    Ok(())
}

fn session_name(state: &State, session: u32) -> String {
    state.sessions.get(&session).map(|s| s.name.clone()).unwrap_or_default()
}

/// Binds a session to a machine.
pub(crate) fn attach(state: &mut State, session: u32, machine: Uuid, kind: SessionType) -> ApiResult<()> {
    let session = state.sessions.get_mut(&session).ok_or_else(gone)?;
    session.machine = Some(machine);
    session.kind = kind;
    session.state = SessionState::Locked;
    Ok(())
}

/// Frees a session; returns the machine that it was bound to.
pub(crate) fn detach(state: &mut State, session: u32) -> Option<Uuid> {
    let session = state.sessions.get_mut(&session)?;
    session.kind = SessionType::Null;
    session.state = SessionState::Unlocked;
    session.machine.take()
}

/// Frees every session that is bound to the machine.
pub(crate) fn detach_all(state: &mut State, machine: Uuid) {
    for session in state.sessions.values_mut().filter(|s| s.machine == Some(machine)) {
        session.kind = SessionType::Null;
        session.state = SessionState::Unlocked;
        session.machine = None;
    }
}
