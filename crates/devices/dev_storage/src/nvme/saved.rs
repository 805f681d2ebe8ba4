//! Saved state of the NVMe controller, version 2: registers, features, queues, doorbell buffers (since version 2), events and counters. Commands under way are not part of
//! it: they have ended when it is taken.

use std::collections::VecDeque;

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::Nvme;
use super::controller::{Buffers, Completion, Counters, Cq, ErrorEntry, Sq, State};
use super::spec::{
    Cc, Csts, ERROR_ENTRIES, EVENT_REQUESTS, IO_QUEUES, MAX_ADMIN_ENTRIES, MAX_ENTRIES, feature, shutdown,
};

const VERSION: u32 = 2;
/// Completions that wait for room: of all commands that may be under way, and of admin commands.
const MAX_WAITING: u32 = 16 * 1024;

fn put_sq(out: &mut Writer, sq: &Sq) {
    let Sq { base, entries, cq, head, tail, rings } = sq;
    out.put_u64(*base);
    out.put_u16(*cq);
    [*entries, *head, *tail].into_iter().for_each(|v| out.put_u32(v));
    out.put_bool(*rings);
}

fn take_sq(input: &mut Reader<'_>, most: u32) -> Result<Sq, Error> {
    let (base, cq) = (input.take_u64()?, input.take_u16()?);
    let (entries, head, tail) = (input.take_u32()?, input.take_u32()?, input.take_u32()?);
    let rings = input.version() >= 2 && input.take_bool()?;
    if !(2..=most).contains(&entries) || head >= entries || tail >= entries {
        return Err(input.invalid("a submission queue's size and indexes do not fit"));
    }
    Ok(Sq { base, entries, cq, head, tail, rings })
}

fn put_cq(out: &mut Writer, cq: &Cq) {
    let Cq { base, entries, head, tail, phase, interrupts, vector, waiting } = cq;
    out.put_u64(*base);
    [*entries, *head, *tail].into_iter().for_each(|v| out.put_u32(v));
    out.put_bool(*phase);
    out.put_bool(*interrupts);
    out.put_u16(*vector);
    out.put_u32(waiting.len() as u32);
    for Completion { dw0, sq, cid, status } in waiting {
        out.put_u32(*dw0);
        [*sq, *cid, *status].into_iter().for_each(|v| out.put_u16(v));
    }
}

fn take_cq(input: &mut Reader<'_>, most: u32) -> Result<Cq, Error> {
    let base = input.take_u64()?;
    let (entries, head, tail) = (input.take_u32()?, input.take_u32()?, input.take_u32()?);
    let (phase, interrupts, vector) = (input.take_bool()?, input.take_bool()?, input.take_u16()?);
    let count = input.take_u32()?;
    if !(2..=most).contains(&entries)
        || head >= entries
        || tail >= entries
        || vector > IO_QUEUES
        || count > MAX_WAITING
    {
        return Err(input.invalid("a completion queue's size and indexes do not fit"));
    }
    let mut waiting = VecDeque::new();
    for _ in 0..count {
        let dw0 = input.take_u32()?;
        let (sq, cid, status) = (input.take_u16()?, input.take_u16()?, input.take_u16()?);
        waiting.push_back(Completion { dw0, sq, cid, status });
    }
    Ok(Cq { base, entries, head, tail, phase, interrupts, vector, waiting })
}

fn put_state(out: &mut Writer, state: &State) {
    let State {
        intms,
        cc,
        csts,
        aqa,
        asq,
        acq,
        features,
        sqs,
        cqs,
        buffers,
        event_requests,
        events,
        events_masked,
        errors,
        error_count,
        counters,
    } = state;
    [*intms, (*cc).into(), (*csts).into(), *aqa].into_iter().for_each(|v| out.put_u32(v));
    out.put_u64(*asq);
    out.put_u64(*acq);
    features.iter().for_each(|v| out.put_u32(*v));
    for (sq, cq) in sqs.iter().zip(cqs) {
        out.put_bool(sq.is_some());
        sq.iter().for_each(|sq| put_sq(out, sq));
        out.put_bool(cq.is_some());
        cq.iter().for_each(|cq| put_cq(out, cq));
    }
    out.put_bool(buffers.is_some());
    if let Some(Buffers { doorbells, events }) = buffers {
        out.put_u64(*doorbells);
        out.put_u64(*events);
    }
    out.put_u8(event_requests.len() as u8);
    event_requests.iter().for_each(|cid| out.put_u16(*cid));
    out.put_u8(events.len() as u8);
    events.iter().for_each(|event| out.put_u32(*event));
    out.put_u8(*events_masked);
    out.put_u8(errors.len() as u8);
    for ErrorEntry { count, sq, cid, status, lba, nsid } in errors {
        out.put_u64(*count);
        [*sq, *cid, *status].into_iter().for_each(|v| out.put_u16(v));
        out.put_u64(*lba);
        out.put_u32(*nsid);
    }
    let Counters { blocks_read, blocks_written, reads, writes, media_errors } = counters;
    for value in [error_count, blocks_read, blocks_written, reads, writes, media_errors] {
        out.put_u64(*value);
    }
}

fn take_state(input: &mut Reader<'_>) -> Result<State, Error> {
    let mut state = State::new();
    state.intms = input.take_u32()?;
    state.cc = Cc::from(input.take_u32()?);
    state.csts = Csts::from(input.take_u32()?);
    state.aqa = input.take_u32()?;
    state.asq = input.take_u64()?;
    state.acq = input.take_u64()?;
    for (value, bits) in state.features.iter_mut().zip(feature::BITS) {
        *value = input.take_u32()? & bits;
    }
    for queue in 0..state.sqs.len() {
        let most = if queue == 0 { MAX_ADMIN_ENTRIES } else { MAX_ENTRIES };
        if input.take_bool()? {
            state.sqs[queue] = Some(take_sq(input, most)?);
        }
        if input.take_bool()? {
            state.cqs[queue] = Some(take_cq(input, most)?);
        }
    }
    let lost = |sq: &Sq| state.cqs.get(usize::from(sq.cq)).is_none_or(Option::is_none);
    if state.sqs.iter().flatten().any(lost) || state.csts.rdy() && state.sqs[0].is_none() {
        return Err(input.invalid("a queue lacks its counterpart"));
    }
    if state.csts.shst() == shutdown::UNDER_WAY {
        return Err(input.invalid("it was taken while the controller shut down"));
    }
    if input.version() >= 2 && input.take_bool()? {
        state.buffers = Some(Buffers { doorbells: input.take_u64()?, events: input.take_u64()? });
    }
    let count = input.take_u8()?;
    if usize::from(count) > EVENT_REQUESTS {
        return Err(input.invalid(format!("{count} event requests")));
    }
    for _ in 0..count {
        state.event_requests.push_back(input.take_u16()?);
    }
    for _ in 0..input.take_u8()? {
        state.events.push_back(input.take_u32()?);
    }
    state.events_masked = input.take_u8()?;
    let count = input.take_u8()?;
    if usize::from(count) > ERROR_ENTRIES {
        return Err(input.invalid(format!("{count} entries in the error log")));
    }
    for _ in 0..count {
        state.errors.push_back(ErrorEntry {
            count: input.take_u64()?,
            sq: input.take_u16()?,
            cid: input.take_u16()?,
            status: input.take_u16()?,
            lba: input.take_u64()?,
            nsid: input.take_u32()?,
        });
    }
    let mut values = [0; 6];
    for value in &mut values {
        *value = input.take_u64()?;
    }
    let [error_count, blocks_read, blocks_written, reads, writes, media_errors] = values;
    state.error_count = error_count;
    state.counters = Counters { blocks_read, blocks_written, reads, writes, media_errors };
    Ok(state)
}

impl Saveable for Nvme {
    fn unit_name(&self) -> &'static str {
        "nvme"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        if !self.is_idle() {
            tracing::error!(target: "nvme", "saved while a disk request is under way: the state cannot be restored");
        }
        out.put_bool(self.intx_disabled);
        // Disks are the settings' part; the guest knows their sizes.
        out.put_u8(self.media.len() as u8);
        for shape in &self.core.namespaces {
            out.put_u64(shape.as_ref().map_or(0, |shape| shape.blocks));
        }
        put_state(out, &self.core.state);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let intx_disabled = input.take_bool()?;
        if usize::from(input.take_u8()?) != self.media.len() {
            return Err(input.invalid("the controller has another number of ports"));
        }
        for shape in &self.core.namespaces {
            if input.take_u64()? != shape.as_ref().map_or(0, |shape| shape.blocks) {
                return Err(input.invalid("a port has another disk"));
            }
        }
        let state = take_state(&mut input)?;
        input.finish()?;
        self.core.reset();
        self.core.state = state;
        self.intx_disabled = intx_disabled;
        self.sync_pin();
        // Commands that waited in their queues go on.
        let mut out = super::Out::default();
        self.core.resume(&self.wiring.pgm, &mut out);
        self.apply(out);
        Ok(())
    }
}
