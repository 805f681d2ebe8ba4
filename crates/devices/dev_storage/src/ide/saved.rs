//! Saved state of the IDE controller, version 1: both channels' plain state. Requests under way are not part of it.

use std::collections::VecDeque;

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::Ide;
use super::channel::{BusMaster, Channel, Deep, DriveState, Job, MAX_BUFFER, Phase, Sectors, State};
use crate::scsi::cd::CdState;
use crate::scsi::sense::{Alerts, Sense};

const VERSION: u32 = 1;
/// Most ranges one DATA SET MANAGEMENT can leave to do.
const MAX_RANGES: u32 = (MAX_BUFFER / 8) as u32;

fn put_deep(out: &mut Writer, value: Deep) {
    let Deep { now, before } = value;
    out.put_u8(now);
    out.put_u8(before);
}

fn take_deep(input: &mut Reader<'_>) -> Result<Deep, Error> {
    Ok(Deep { now: input.take_u8()?, before: input.take_u8()? })
}

fn put_sectors(out: &mut Writer, value: Sectors) {
    let Sectors { next, left, chunk, block, dma, wide } = value;
    out.put_u64(next);
    out.put_u32(left);
    out.put_u32(chunk);
    out.put_u8(block);
    out.put_bool(dma);
    out.put_bool(wide);
}

fn take_sectors(input: &mut Reader<'_>) -> Result<Sectors, Error> {
    let sectors = Sectors {
        next: input.take_u64()?,
        left: input.take_u32()?,
        chunk: input.take_u32()?,
        block: input.take_u8()?,
        dma: input.take_bool()?,
        wide: input.take_bool()?,
    };
    if sectors.left > 0x1_0000 || sectors.next > 1 << 48 || !(1..=128).contains(&sectors.block) {
        return Err(input.invalid("sector range of a command"));
    }
    Ok(sectors)
}

fn put_drive(out: &mut Writer, drive: &DriveState) {
    let DriveState {
        status,
        error,
        features,
        count,
        lba,
        device,
        interrupt,
        multiple,
        heads,
        sectors_per_track,
        mode,
        write_cache,
        look_ahead,
        standby,
        alerts,
        cd,
        byte_limit,
    } = drive;
    out.put_bytes(&[*status, *error, *device, *multiple, *heads, *sectors_per_track, *mode]);
    for deep in [*features, *count, lba[0], lba[1], lba[2]] {
        put_deep(out, deep);
    }
    for flag in [*interrupt, *write_cache, *look_ahead, *standby] {
        out.put_bool(flag);
    }
    let Alerts { sense, attention } = *alerts;
    sense.save(out);
    attention.save(out);
    out.put_u16(*byte_limit);
    let CdState { locked, tray_open, event } = *cd;
    out.put_bool(locked);
    out.put_bool(tray_open);
    out.put_u8(event);
}

fn take_drive(input: &mut Reader<'_>) -> Result<DriveState, Error> {
    let mut bytes = [0; 7];
    input.take_into(&mut bytes)?;
    let [status, error, device, multiple, heads, sectors_per_track, mode] = bytes;
    if heads == 0 || sectors_per_track == 0 || multiple > 128 {
        return Err(input.invalid("translation of a drive"));
    }
    let features = take_deep(input)?;
    let count = take_deep(input)?;
    let lba = [take_deep(input)?, take_deep(input)?, take_deep(input)?];
    Ok(DriveState {
        status,
        error,
        features,
        count,
        lba,
        device,
        multiple,
        heads,
        sectors_per_track,
        mode,
        interrupt: input.take_bool()?,
        write_cache: input.take_bool()?,
        look_ahead: input.take_bool()?,
        standby: input.take_bool()?,
        alerts: Alerts { sense: Sense::load(input)?, attention: Sense::load(input)? },
        byte_limit: input.take_u16()?,
        cd: CdState { locked: input.take_bool()?, tray_open: input.take_bool()?, event: input.take_u8()? },
    })
}

fn put_job(out: &mut Writer, job: &Job) {
    match job {
        Job::None => out.put_u8(0),
        Job::Reply => out.put_u8(1),
        Job::Read(sectors) => {
            out.put_u8(2);
            put_sectors(out, *sectors);
        }
        Job::Write { sectors, fua } => {
            out.put_u8(3);
            put_sectors(out, *sectors);
            out.put_bool(*fua);
        }
        Job::Verify(sectors) => {
            out.put_u8(4);
            put_sectors(out, *sectors);
        }
        Job::Flush => out.put_u8(5),
        Job::Trim { ranges } => {
            out.put_u8(6);
            out.put_u32(ranges.len() as u32);
            for (first, count) in ranges {
                out.put_u64(*first);
                out.put_u64(*count);
            }
        }
        Job::Packet { dma } => {
            out.put_u8(7);
            out.put_bool(*dma);
        }
        Job::PacketReply { dma } => {
            out.put_u8(8);
            out.put_bool(*dma);
        }
        Job::PacketRead { next, left, raw, dma } => {
            out.put_u8(9);
            out.put_u32(*next);
            out.put_u32(*left);
            out.put_bool(*raw);
            out.put_bool(*dma);
        }
    }
}

fn take_job(input: &mut Reader<'_>) -> Result<Job, Error> {
    Ok(match input.take_u8()? {
        0 => Job::None,
        1 => Job::Reply,
        2 => Job::Read(take_sectors(input)?),
        3 => Job::Write { sectors: take_sectors(input)?, fua: input.take_bool()? },
        4 => Job::Verify(take_sectors(input)?),
        5 => Job::Flush,
        6 => {
            let count = input.take_u32()?;
            if count > MAX_RANGES {
                return Err(input.invalid("number of ranges to discard"));
            }
            let mut ranges = VecDeque::new();
            for _ in 0..count {
                let (first, sectors) = (input.take_u64()?, input.take_u64()?);
                if first >> 48 != 0 || sectors >> 16 != 0 {
                    return Err(input.invalid("range to discard"));
                }
                ranges.push_back((first, sectors));
            }
            Job::Trim { ranges }
        }
        7 => Job::Packet { dma: input.take_bool()? },
        8 => Job::PacketReply { dma: input.take_bool()? },
        9 => {
            let (next, left) = (input.take_u32()?, input.take_u32()?);
            if next.checked_add(left).is_none() {
                return Err(input.invalid("sector range of a packet command"));
            }
            Job::PacketRead { next, left, raw: input.take_bool()?, dma: input.take_bool()? }
        }
        other => return Err(input.invalid(format!("unknown command state {other}"))),
    })
}

pub(crate) fn put_channel(out: &mut Writer, state: &State) {
    let State { drives, selected, control, active, job, phase, buffer, pos, block_end, bm } = state;
    for drive in drives {
        put_drive(out, drive);
    }
    out.put_bytes(&[*selected, *control, *active]);
    put_job(out, job);
    out.put_u8(match phase {
        Phase::Idle => 0,
        Phase::PioIn => 1,
        Phase::PioOut => 2,
        Phase::DmaIn => 3,
        Phase::DmaOut => 4,
        Phase::Busy => 5,
    });
    out.put_blob(buffer);
    out.put_u32(*pos as u32);
    out.put_u32(*block_end as u32);
    let BusMaster { command, status, table, entry, address, left, last } = bm;
    out.put_bytes(&[*command, *status]);
    for value in [*table, *entry, *address, *left] {
        out.put_u32(value);
    }
    out.put_bool(*last);
}

pub(crate) fn take_channel(input: &mut Reader<'_>) -> Result<State, Error> {
    let drives = [take_drive(input)?, take_drive(input)?];
    let (selected, control, active) = (input.take_u8()?, input.take_u8()?, input.take_u8()?);
    if selected > 1 || active > 1 {
        return Err(input.invalid("drive selection"));
    }
    let job = take_job(input)?;
    let phase = match input.take_u8()? {
        0 => Phase::Idle,
        1 => Phase::PioIn,
        2 => Phase::PioOut,
        3 => Phase::DmaIn,
        4 => Phase::DmaOut,
        _ => return Err(input.invalid("it was taken while a disk request was under way")),
    };
    let buffer = input.take_blob(MAX_BUFFER)?.to_vec();
    let (pos, block_end) = (input.take_u32()? as usize, input.take_u32()? as usize);
    if pos > buffer.len() || block_end > buffer.len() {
        return Err(input.invalid("place in the transfer buffer"));
    }
    check_transfer(input, &job, phase, &buffer, pos, block_end)?;
    let bm = BusMaster {
        command: input.take_u8()?,
        status: input.take_u8()?,
        table: input.take_u32()?,
        entry: input.take_u32()?,
        address: input.take_u32()?,
        left: input.take_u32()?,
        last: input.take_bool()?,
    };
    if bm.entry > 0x1_0000 || !bm.entry.is_multiple_of(8) || bm.left > 0x1_0000 {
        return Err(input.invalid("place in the bus master's table"));
    }
    Ok(State { drives, selected, control, active, job, phase, buffer, pos, block_end, bm })
}

/// What the transfer's code takes for granted.
fn check_transfer(
    input: &Reader<'_>,
    job: &Job,
    phase: Phase,
    buffer: &[u8],
    pos: usize,
    block_end: usize,
) -> Result<(), Error> {
    let in_block = pos < block_end;
    let sound = match phase {
        Phase::Idle => *job == Job::None && buffer.is_empty(),
        Phase::PioIn => in_block,
        Phase::PioOut => in_block && (!matches!(job, Job::Packet { .. }) || buffer.len() == 12),
        Phase::DmaIn | Phase::DmaOut => pos < buffer.len() && !matches!(job, Job::Packet { .. }),
        Phase::Busy => false,
    };
    if sound { Ok(()) } else { Err(input.invalid("data phase of a command")) }
}

impl Saveable for Ide {
    fn unit_name(&self) -> &'static str {
        "piix3ide"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        if !self.is_idle() {
            tracing::error!(target: "ide", "saved while a disk request is under way: the state cannot be restored");
        }
        for Channel { state, .. } in &self.channels {
            put_channel(out, state);
        }
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let states = [take_channel(&mut input)?, take_channel(&mut input)?];
        input.finish()?;
        for (index, state) in states.into_iter().enumerate() {
            self.channels[index].state = state;
            // Not `sync`: the line's rise was noted in the bus master's status when it happened.
            let level = self.channels[index].irq_level();
            self.irq_levels[index] = level;
            self.wiring.irqs[index].set(level);
        }
        Ok(())
    }
}
