//! Saved state of the floppy controller, version 1. Requests under way are not part of it.

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::Floppy;
use super::chip::{DriveState, FIFO, Kind, MAX_BUFFER, Phase, State, Transfer};

const VERSION: u32 = 1;

fn put_transfer(out: &mut Writer, transfer: &Transfer) {
    let Transfer { kind, drive, multi_track, cylinder, head, sector, last, ending } = transfer;
    match kind {
        Kind::Read => out.put_u8(0),
        Kind::ReadDeleted => out.put_u8(1),
        Kind::Write => out.put_u8(2),
        Kind::Verify { left } => {
            out.put_u8(3);
            out.put_bool(left.is_some());
            out.put_u8(left.unwrap_or(0));
        }
        Kind::Format { fill } => {
            out.put_u8(4);
            out.put_u8(*fill);
        }
    }
    out.put_bytes(&[*drive, *cylinder, *head, *sector, *last]);
    out.put_bool(*multi_track);
    out.put_bool(*ending);
}

fn take_transfer(input: &mut Reader<'_>) -> Result<Transfer, Error> {
    let kind = match input.take_u8()? {
        0 => Kind::Read,
        1 => Kind::ReadDeleted,
        2 => Kind::Write,
        3 => {
            let counted = input.take_bool()?;
            let left = input.take_u8()?;
            Kind::Verify { left: counted.then_some(left) }
        }
        4 => Kind::Format { fill: input.take_u8()? },
        other => return Err(input.invalid(format!("unknown transfer {other}"))),
    };
    let mut bytes = [0; 5];
    input.take_into(&mut bytes)?;
    let [drive, cylinder, head, sector, last] = bytes;
    if drive > 3 || head > 1 {
        return Err(input.invalid("address of a transfer"));
    }
    Ok(Transfer {
        kind,
        drive,
        cylinder,
        head,
        sector,
        last,
        multi_track: input.take_bool()?,
        ending: input.take_bool()?,
    })
}

fn put_state(out: &mut Writer, state: &State) {
    let State {
        dor,
        tape,
        rate,
        phase,
        fifo,
        fifo_len,
        fifo_pos,
        interrupt,
        drives,
        specify,
        non_dma,
        configure,
        precompensation,
        lock,
        perpendicular,
        transfer,
        buffer,
        pos,
    } = state;
    let phase = match phase {
        Phase::Reset => 0,
        Phase::Command => 1,
        Phase::DmaIn => 2,
        Phase::DmaOut => 3,
        Phase::PioIn => 4,
        Phase::PioOut => 5,
        Phase::Result => 6,
        Phase::Busy => 7,
    };
    out.put_bytes(&[*dor, *tape, *rate, phase]);
    out.put_bytes(fifo);
    out.put_bytes(&[*fifo_len, *fifo_pos]);
    out.put_bool(*interrupt);
    for DriveState { track, changed, sense } in drives {
        out.put_u8(*track);
        out.put_bool(*changed);
        out.put_bool(sense.is_some());
        out.put_u8(sense.unwrap_or(0));
    }
    out.put_bytes(specify);
    out.put_bool(*non_dma);
    out.put_bytes(&[*configure, *precompensation]);
    out.put_bool(*lock);
    out.put_u8(*perpendicular);
    out.put_bool(transfer.is_some());
    if let Some(transfer) = transfer {
        put_transfer(out, transfer);
    }
    out.put_blob(buffer);
    out.put_u32(*pos);
}

fn take_state(input: &mut Reader<'_>) -> Result<State, Error> {
    let mut head = [0; 4];
    input.take_into(&mut head)?;
    let [dor, tape, rate, phase] = head;
    let phase = match phase {
        0 => Phase::Reset,
        1 => Phase::Command,
        2 => Phase::DmaIn,
        3 => Phase::DmaOut,
        4 => Phase::PioIn,
        5 => Phase::PioOut,
        6 => Phase::Result,
        _ => return Err(input.invalid("it was taken while a medium request was under way")),
    };
    let mut fifo = [0; FIFO];
    input.take_into(&mut fifo)?;
    let (fifo_len, fifo_pos) = (input.take_u8()?, input.take_u8()?);
    let interrupt = input.take_bool()?;
    let mut drives = [DriveState::default(); 4];
    for drive in &mut drives {
        drive.track = input.take_u8()?;
        drive.changed = input.take_bool()?;
        let pending = input.take_bool()?;
        let sense = input.take_u8()?;
        drive.sense = pending.then_some(sense);
    }
    let mut specify = [0; 2];
    input.take_into(&mut specify)?;
    let state = State {
        dor,
        tape,
        rate,
        phase,
        fifo,
        fifo_len,
        fifo_pos,
        interrupt,
        drives,
        specify,
        non_dma: input.take_bool()?,
        configure: input.take_u8()?,
        precompensation: input.take_u8()?,
        lock: input.take_bool()?,
        perpendicular: input.take_u8()?,
        transfer: if input.take_bool()? { Some(take_transfer(input)?) } else { None },
        buffer: input.take_blob(MAX_BUFFER)?.to_vec(),
        pos: input.take_u32()?,
    };
    let fifo_limit = if phase == Phase::Command { FIFO - 1 } else { FIFO };
    let transferring = !matches!(phase, Phase::Reset | Phase::Command | Phase::Result);
    let sound = rate <= 3
        && usize::from(fifo_len) <= fifo_limit
        && (phase != Phase::Result || fifo_pos < fifo_len)
        && state.transfer.is_some() == transferring
        && state.buffer.is_empty() != transferring
        && (if transferring { (state.pos as usize) < state.buffer.len() } else { state.pos == 0 });
    if sound { Ok(state) } else { Err(input.invalid("phase of the controller")) }
}

impl Saveable for Floppy {
    fn unit_name(&self) -> &'static str {
        "i82078"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        if !self.is_idle() {
            tracing::error!(target: "floppy", "saved while a request is under way: the state cannot be restored");
        }
        put_state(out, &self.chip.state);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let state = take_state(&mut input)?;
        input.finish()?;
        self.chip.state = state;
        self.wiring.irq.set(self.chip.irq_level());
        Ok(())
    }
}
