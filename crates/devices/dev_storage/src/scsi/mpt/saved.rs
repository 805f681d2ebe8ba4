//! Saved state of an MPT controller, version 1: its registers, queues and doorbell, then the targets.

use std::collections::VecDeque;

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::spec::{KEYS, Reply, interrupt};
use super::{Bell, CREDITS, Ioc, MAX_MESSAGE, Mpt, REPLY_FRAMES, State};

const VERSION: u32 = 1;
/// Bytes of the longest reply.
const MAX_REPLY: usize = 255 * 4;

fn put_words(out: &mut Writer, words: impl ExactSizeIterator<Item = u32>) {
    out.put_u32(words.len() as u32);
    words.for_each(|word| out.put_u32(word));
}

fn take_words(input: &mut Reader<'_>, limit: usize, what: &str) -> Result<Vec<u32>, Error> {
    let count = input.take_u32()? as usize;
    if count > limit {
        return Err(input.invalid(format!("{count} {what}")));
    }
    (0..count).map(|_| input.take_u32()).collect()
}

fn put_state(out: &mut Writer, state: &State) {
    let State {
        ioc,
        bell,
        bell_interrupt,
        interrupt_mask,
        keys,
        reply_free,
        reply_post,
        pending,
        who_init,
        max_devices,
        max_buses,
        reply_size,
        frames_high,
        sense_high,
        events,
        spi_requests,
    } = state;
    let (kind, code) = match ioc {
        Ioc::Ready => (1, 0),
        Ioc::Operational => (2, 0),
        Ioc::Fault(code) => (4, *code),
    };
    out.put_u8(kind);
    out.put_u16(code);
    match bell {
        Bell::Idle => out.put_u8(0),
        Bell::Receiving { words, expected } => {
            out.put_u8(1);
            out.put_u8(*expected as u8);
            put_words(out, words.iter().copied());
        }
        Bell::Replying { halves, next } => {
            out.put_u8(2);
            out.put_u32(*next as u32);
            put_words(out, halves.iter().map(|half| u32::from(*half)));
        }
    }
    out.put_bool(*bell_interrupt);
    out.put_u32(*interrupt_mask);
    [*keys, *who_init, *max_devices, *max_buses].into_iter().for_each(|byte| out.put_u8(byte));
    out.put_u16(*reply_size);
    out.put_u32(*frames_high);
    out.put_u32(*sense_high);
    put_words(out, reply_free.iter().copied());
    put_words(out, reply_post.iter().copied());
    out.put_u32(pending.len() as u32);
    pending.iter().for_each(|Reply(bytes)| out.put_blob(bytes));
    out.put_bool(events.is_some());
    out.put_u32(events.unwrap_or(0));
    put_words(out, spi_requests.as_flattened().iter().copied());
}

fn take_state(input: &mut Reader<'_>, targets: usize) -> Result<State, Error> {
    let ioc = match (input.take_u8()?, input.take_u16()?) {
        (1, _) => Ioc::Ready,
        (2, _) => Ioc::Operational,
        (4, code) => Ioc::Fault(code),
        _ => return Err(input.invalid("state of the I/O controller")),
    };
    let bell = match input.take_u8()? {
        0 => Bell::Idle,
        1 => {
            let expected = usize::from(input.take_u8()?);
            let words = take_words(input, MAX_MESSAGE, "words of a message")?;
            if expected > MAX_MESSAGE || words.len() >= expected {
                return Err(input.invalid("length of a message"));
            }
            Bell::Receiving { words, expected }
        }
        2 => {
            let next = input.take_u32()? as usize;
            let words = take_words(input, 2 * (REPLY_FRAMES + 1), "half-words of a reply")?;
            let halves: Result<Vec<u16>, _> = words.into_iter().map(u16::try_from).collect();
            match halves {
                Ok(halves) if next <= halves.len() => Bell::Replying { halves, next },
                _ => return Err(input.invalid("reply through the doorbell")),
            }
        }
        _ => return Err(input.invalid("state of the doorbell")),
    };
    let bell_interrupt = input.take_bool()?;
    let interrupt_mask = input.take_u32()?;
    let mut bytes = [0; 4];
    input.take_into(&mut bytes)?;
    let [keys, who_init, max_devices, max_buses] = bytes;
    if usize::from(keys) > KEYS.len() || interrupt_mask & !interrupt::MASK != 0 {
        return Err(input.invalid("diagnostic keys or interrupt mask"));
    }
    let reply_size = input.take_u16()?;
    let (frames_high, sense_high) = (input.take_u32()?, input.take_u32()?);
    let reply_free = take_words(input, REPLY_FRAMES, "frames for replies")?.into();
    let reply_post = take_words(input, CREDITS, "unread replies")?.into();
    let count = input.take_u32()? as usize;
    if count > CREDITS {
        return Err(input.invalid(format!("{count} replies that wait")));
    }
    let mut pending = VecDeque::new();
    for _ in 0..count {
        pending.push_back(Reply(input.take_blob(MAX_REPLY)?.to_vec()));
    }
    let (on, context) = (input.take_bool()?, input.take_u32()?);
    let requests = take_words(input, 2 * targets, "parameters of targets")?;
    if requests.len() != 2 * targets {
        return Err(input.invalid("number of targets"));
    }
    let spi_requests = requests.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect();
    Ok(State {
        ioc,
        bell,
        bell_interrupt,
        interrupt_mask,
        keys,
        reply_free,
        reply_post,
        pending,
        who_init,
        max_devices,
        max_buses,
        reply_size,
        frames_high,
        sense_high,
        events: on.then_some(context),
        spi_requests,
    })
}

impl Saveable for Mpt {
    fn unit_name(&self) -> &'static str {
        self.model.name()
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        out.put_bool(self.intx_disabled);
        put_state(out, &self.state);
        self.bus.save(out);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let intx_disabled = input.take_bool()?;
        let state = take_state(&mut input, self.bus.places())?;
        let targets = self.bus.load(&mut input)?;
        input.finish()?;
        self.bus.restore(targets);
        (self.state, self.intx_disabled) = (state, intx_disabled);
        self.sync();
        Ok(())
    }
}
