//! The targets of a controller, and the commands under way at them.
//!
//! A controller hands a command in with [`Bus::command`] and finds it, ended, in [`Bus::take_done`]: at once, or after
//! [`Bus::answered`] was called from a completion of the medium. Commands to one unit run side by side. A command that is aborted
//! never ends: the controller tells the guest what it has to. What it had asked of the medium may still come to pass; until it has,
//! later commands to the unit wait, so that an abandoned write cannot overtake a later one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use pdm::connector::{BlockError, Medium};
use pgm::Pgm;
use ssm::{Error, Reader, Writer};

use super::sense::Sense;
use super::sg::SgList;
use super::unit::{Buffers, Cdb, Job, Plan, State, Unit};
use super::{EjectSink, TargetError};
use crate::ide::Drive;

/// SCSI status codes.
pub(crate) mod status {
    pub(crate) const GOOD: u8 = 0;
    pub(crate) const CHECK_CONDITION: u8 = 2;
}

/// Passes a medium's answer to the controller, which hands it to [`Bus::answered`].
pub(crate) type Answer = Arc<dyn Fn(u64, Result<Vec<u8>, BlockError>) + Send + Sync>;

/// A command for a target.
pub(crate) struct Command<T> {
    pub(crate) target: usize,
    pub(crate) lun: u64,
    pub(crate) cdb: Cdb,
    /// Data for the target.
    pub(crate) out: SgList,
    /// Room for data from the target.
    pub(crate) into: SgList,
    /// What the controller knows the command by.
    pub(crate) tag: T,
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Done<T> {
    pub(crate) tag: T,
    pub(crate) status: u8,
    /// With CHECK CONDITION.
    pub(crate) sense: Sense,
    /// Bytes of data that were moved.
    pub(crate) moved: u64,
}

struct Running<T> {
    command: Command<T>,
    job: Job,
    moved: u64,
    /// A request is with the medium.
    asked: bool,
}

struct Target {
    unit: Unit,
    /// Tells this drive from others that were plugged in here before.
    serial: u64,
    /// Commands that wait for abandoned requests.
    waiting: VecDeque<u64>,
}

pub(crate) struct Bus<T> {
    memory: Arc<Pgm>,
    answer: Answer,
    ejected: Option<Arc<dyn EjectSink>>,
    targets: Vec<Option<Target>>,
    /// By number of the command.
    running: BTreeMap<u64, Running<T>>,
    /// Numbers of commands that were aborted while the medium was asked, with the drive's serial number.
    abandoned: BTreeMap<u64, u64>,
    next: u64,
    done: VecDeque<Done<T>>,
}

impl<T> Bus<T> {
    pub(crate) fn new(
        memory: Arc<Pgm>,
        drives: Vec<Option<Drive>>,
        ejected: Option<Arc<dyn EjectSink>>,
        answer: Answer,
    ) -> Self {
        let mut bus = Self {
            memory,
            answer,
            ejected,
            targets: Vec::new(),
            running: BTreeMap::new(),
            abandoned: BTreeMap::new(),
            next: 0,
            done: VecDeque::new(),
        };
        for drive in drives {
            let target = drive.map(|drive| bus.target(drive));
            bus.targets.push(target);
        }
        bus
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn target(&mut self, drive: Drive) -> Target {
        Target { unit: Unit::new(drive), serial: self.number(), waiting: VecDeque::new() }
    }

    pub(crate) fn memory(&self) -> &Arc<Pgm> {
        &self.memory
    }

    /// Number of places for targets.
    pub(crate) fn places(&self) -> usize {
        self.targets.len()
    }

    pub(crate) fn is_present(&self, target: usize) -> bool {
        self.targets.get(target).is_some_and(Option::is_some)
    }

    /// Whether no request is with a medium.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.abandoned.is_empty()
    }

    /// Whether `most` commands are under way.
    pub(crate) fn is_full(&self, most: usize) -> bool {
        self.running.len() >= most
    }

    /// A command that has ended, in the order of their ends.
    pub(crate) fn take_done(&mut self) -> Option<Done<T>> {
        self.done.pop_front()
    }

    fn end(&mut self, command: Command<T>, sense: Sense, moved: u64) {
        if let Some(Some(target)) = self.targets.get_mut(command.target) {
            target.unit.ended(command.cdb[0], sense);
        }
        let status = if sense == Sense::NONE { status::GOOD } else { status::CHECK_CONDITION };
        self.done.push_back(Done { tag: command.tag, status, sense, moved });
    }

    /// Takes a command for a target; the command is given back if there is none.
    pub(crate) fn command(&mut self, command: Command<T>) -> Result<(), Command<T>> {
        let number = self.number();
        let Some(Some(target)) = self.targets.get_mut(command.target) else { return Err(command) };
        let host = Buffers { memory: &self.memory, out: &command.out, into: &command.into };
        let plan = if command.lun == 0 {
            target.unit.start(&command.cdb, &host)
        } else {
            Unit::start_absent(&command.cdb)
        };
        match plan {
            Plan::Good => {
                // Parameters, where there were any, have been taken.
                let moved = command.out.len();
                self.end(command, Sense::NONE, moved);
            }
            Plan::Fail(sense) => self.end(command, sense, 0),
            Plan::Data(bytes) => {
                let moved = command.into.write(&self.memory, 0, &bytes) as u64;
                self.end(command, Sense::NONE, moved);
            }
            Plan::Work(job) => {
                let held = self.abandoned.values().any(|serial| *serial == target.serial);
                if held {
                    target.waiting.push_back(number);
                }
                let moved = if job.moves_data() { 0 } else { command.out.len() };
                self.running.insert(number, Running { command, job, moved, asked: false });
                if !held {
                    self.go_on(number);
                }
            }
        }
        self.let_go();
        Ok(())
    }

    /// Asks the medium for the next piece of a command, or ends it.
    fn go_on(&mut self, number: u64) {
        let Some(running) = self.running.get_mut(&number) else { return };
        let Running { command, job, moved, asked } = running;
        let host = Buffers { memory: &self.memory, out: &command.out, into: &command.into };
        let target = self.targets.get(command.target).and_then(Option::as_ref);
        let medium = target.and_then(|target| target.unit.medium.clone());
        let sense = match (job.next(&host, moved), medium) {
            (Some(op), Some(medium)) => {
                *asked = true;
                let answer = self.answer.clone();
                return medium.submit(op, Box::new(move |result| answer(number, result)));
            }
            // The disc was taken out under it.
            (Some(_), None) => Sense::NO_MEDIUM,
            (None, _) => Sense::NONE,
        };
        if let Some(Running { command, moved, .. }) = self.running.remove(&number) {
            self.end(command, sense, moved);
        }
    }

    /// The medium has answered.
    pub(crate) fn answered(&mut self, number: u64, result: Result<Vec<u8>, BlockError>) {
        if let Some(serial) = self.abandoned.remove(&number) {
            return self.release(serial);
        }
        let Some(running) = self.running.get_mut(&number) else { return };
        let Running { command, job, moved, asked } = running;
        *asked = false;
        let host = Buffers { memory: &self.memory, out: &command.out, into: &command.into };
        let taken = match result {
            Ok(data) => job.take(&host, moved, &data),
            Err(error) => {
                tracing::warn!(target: "scsi", id = command.target, %error, "the medium failed a request");
                Err(job.failure())
            }
        };
        match taken {
            Ok(()) => self.go_on(number),
            Err(sense) => {
                if let Some(Running { command, moved, .. }) = self.running.remove(&number) {
                    self.end(command, sense, moved);
                }
            }
        }
    }

    /// Lets commands go on that waited for a drive's abandoned requests, if all of those have come back.
    fn release(&mut self, serial: u64) {
        if self.abandoned.values().any(|other| *other == serial) {
            return;
        }
        let target = self.targets.iter_mut().flatten().find(|target| target.serial == serial);
        for number in target.map(|target| std::mem::take(&mut target.waiting)).unwrap_or_default() {
            self.go_on(number);
        }
    }

    /// Whether a command is under way whose target and tag `which` wants.
    pub(crate) fn has(&self, mut which: impl FnMut(usize, &T) -> bool) -> bool {
        self.running.values().any(|running| which(running.command.target, &running.command.tag))
    }

    /// Ends commands without telling: those whose target and tag `which` wants. Gives their tags back.
    pub(crate) fn abort(&mut self, mut which: impl FnMut(usize, &T) -> bool) -> Vec<T> {
        let numbers: Vec<u64> = self
            .running
            .iter()
            .filter(|(_, running)| which(running.command.target, &running.command.tag))
            .map(|(number, _)| *number)
            .collect();
        let mut tags = Vec::new();
        for number in numbers {
            let Some(Running { command, asked, .. }) = self.running.remove(&number) else { continue };
            if let Some(Some(target)) = self.targets.get_mut(command.target) {
                target.waiting.retain(|waiting| *waiting != number);
                if asked {
                    self.abandoned.insert(number, target.serial);
                }
            }
            tags.push(command.tag);
        }
        tags
    }

    /// Resets a target, or all: ends its commands and gives their tags back.
    pub(crate) fn reset(&mut self, only: Option<usize>) -> Vec<T> {
        let tags = self.abort(|target, _| only.is_none_or(|only| only == target));
        for (number, target) in self.targets.iter_mut().enumerate() {
            if let Some(target) = target
                && only.is_none_or(|only| only == number)
            {
                target.unit.reset();
            }
        }
        tags
    }

    /// Power-on and system reset.
    pub(crate) fn power_on(&mut self) {
        self.abort(|_, _| true);
        self.done.clear();
        self.targets.iter_mut().flatten().for_each(|target| target.unit.power_on());
    }

    /// Lets go of discs that the guest has ejected.
    fn let_go(&mut self) {
        for (number, target) in self.targets.iter_mut().enumerate() {
            if let Some(target) = target
                && target.unit.has_ejected()
            {
                target.unit.set_disc(None);
                if let Some(sink) = &self.ejected {
                    sink.ejected(number);
                }
            }
        }
    }

    /// As [`super::Controller::set_medium`].
    pub(crate) fn set_medium(
        &mut self,
        target: usize,
        medium: Medium,
        force: bool,
    ) -> Result<(), TargetError> {
        let place = self.targets.get_mut(target).ok_or(TargetError::NoTarget(target))?;
        let Some(Target { unit, .. }) = place.as_mut().filter(|target| target.unit.is_cd()) else {
            return Err(TargetError::NoDrive(target));
        };
        if unit.medium.is_some() && unit.state.cd.locked && !force {
            unit.state.cd.eject_request();
            return Err(TargetError::Locked);
        }
        unit.set_disc(medium);
        Ok(())
    }

    /// Plugs a drive into an empty place.
    pub(crate) fn attach(&mut self, target: usize, drive: Drive) -> Result<(), TargetError> {
        match self.targets.get(target) {
            None => return Err(TargetError::NoTarget(target)),
            Some(Some(_)) => return Err(TargetError::Taken(target)),
            Some(None) => {}
        }
        self.targets[target] = Some(self.target(drive));
        Ok(())
    }

    /// Pulls a drive out; gives the tags of the commands back that end with it. Requests under way reach its medium still.
    pub(crate) fn detach(&mut self, target: usize) -> Result<Vec<T>, TargetError> {
        if target >= self.targets.len() {
            return Err(TargetError::NoTarget(target));
        }
        let tags = self.abort(|other, _| other == target);
        self.targets[target] = None;
        Ok(tags)
    }

    /// What can be seen of the units. Commands under way are not part of it.
    pub(crate) fn save(&self, out: &mut Writer) {
        if !self.is_idle() || !self.done.is_empty() {
            tracing::error!(target: "scsi", "saved while a command is under way: it is lost");
        }
        out.put_u16(self.targets.len() as u16);
        for target in &self.targets {
            out.put_bool(target.is_some());
            if let Some(target) = target {
                target.unit.state.save(out);
            }
        }
    }

    /// Reads what [`Self::save`] wrote; [`Self::restore`] takes it over.
    pub(crate) fn load(&self, input: &mut Reader<'_>) -> Result<Vec<Option<State>>, Error> {
        let count = usize::from(input.take_u16()?);
        if count != self.targets.len() {
            return Err(input.invalid(format!(
                "it has {count} places for drives, the machine's controller has {}",
                self.targets.len()
            )));
        }
        let mut states = Vec::new();
        for target in &self.targets {
            let present = input.take_bool()?;
            if present != target.is_some() {
                return Err(input.invalid("a place has a drive in one of saved state and machine only"));
            }
            states.push(if present { Some(State::load(input)?) } else { None });
        }
        Ok(states)
    }

    pub(crate) fn restore(&mut self, states: Vec<Option<State>>) {
        self.abort(|_, _| true);
        self.done.clear();
        for (target, state) in self.targets.iter_mut().zip(states) {
            if let (Some(target), Some(state)) = (target, state) {
                target.unit.state = state;
            }
        }
    }
}
