//! Saved state of the BusLogic adapter, version 1: its registers, mailboxes and unread ends, then the targets.

use std::collections::VecDeque;

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::spec::{command, interrupt};
use super::{BusLogic, End, MAX_COMMANDS, MAX_PARAMETERS, MAX_REPLY, Mailboxes, State};

const VERSION: u32 = 1;

fn put_state(out: &mut Writer, state: &State) {
    let State {
        diagnosing,
        invalid,
        operation,
        parameters,
        reply,
        interrupt,
        pending,
        interrupts_on,
        tell_free,
        strict,
        wide_lun,
        mailboxes,
        ends,
    } = state;
    for flag in [*diagnosing, *invalid, *interrupts_on, *tell_free, *strict, *wide_lun] {
        out.put_bool(flag);
    }
    out.put_bool(operation.is_some());
    if let Some((operation, wanted)) = operation {
        out.put_u8(*operation);
        out.put_u16(*wanted as u16);
    }
    out.put_blob(parameters);
    out.put_blob(&reply.iter().copied().collect::<Vec<u8>>());
    out.put_u8(*interrupt);
    out.put_u8(*pending);
    out.put_bool(mailboxes.is_some());
    if let Some(Mailboxes { base, count, old, outgoing, incoming }) = mailboxes {
        out.put_u32(*base);
        [*count, *outgoing, *incoming].into_iter().for_each(|byte| out.put_u8(byte));
        out.put_bool(*old);
    }
    out.put_u32(ends.len() as u32);
    for End { ccb, adapter, device, code } in ends {
        out.put_u32(*ccb);
        out.put_bytes(&[*adapter, *device, *code]);
    }
}

fn take_state(input: &mut Reader<'_>) -> Result<State, Error> {
    let mut flags = [false; 6];
    for flag in &mut flags {
        *flag = input.take_bool()?;
    }
    let [diagnosing, invalid, interrupts_on, tell_free, strict, wide_lun] = flags;
    let operation = match input.take_bool()? {
        true => Some((input.take_u8()?, usize::from(input.take_u16()?))),
        false => None,
    };
    let parameters = input.take_blob(MAX_PARAMETERS)?.to_vec();
    let sound = match operation {
        None => parameters.is_empty(),
        Some((operation, wanted)) => {
            command::parameters(operation).is_some()
                && parameters.len() < wanted
                && wanted <= MAX_PARAMETERS
                && command::parameters(operation).is_some_and(|least| wanted >= least)
        }
    };
    if !sound {
        return Err(input.invalid("parameters of a command"));
    }
    let reply: VecDeque<u8> = input.take_blob(MAX_REPLY)?.to_vec().into();
    let (cause, pending) = (input.take_u8()?, input.take_u8()?);
    if cause != 0 && cause & interrupt::VALID == 0 || pending & interrupt::VALID != 0 {
        return Err(input.invalid("interrupt register"));
    }
    let mailboxes = if input.take_bool()? {
        let base = input.take_u32()?;
        let (count, outgoing, incoming) = (input.take_u8()?, input.take_u8()?, input.take_u8()?);
        if outgoing >= count || incoming >= count {
            return Err(input.invalid("place in the mailboxes"));
        }
        Some(Mailboxes { base, count, old: input.take_bool()?, outgoing, incoming })
    } else {
        None
    };
    let count = input.take_u32()? as usize;
    if count > 2 * MAX_COMMANDS {
        return Err(input.invalid(format!("{count} ends of commands")));
    }
    let mut ends = VecDeque::new();
    for _ in 0..count {
        let ccb = input.take_u32()?;
        let (adapter, device, code) = (input.take_u8()?, input.take_u8()?, input.take_u8()?);
        ends.push_back(End { ccb, adapter, device, code });
    }
    Ok(State {
        diagnosing,
        invalid,
        operation,
        parameters,
        reply,
        interrupt: cause,
        pending,
        interrupts_on,
        tell_free,
        strict,
        wide_lun,
        mailboxes,
        ends,
    })
}

impl Saveable for BusLogic {
    fn unit_name(&self) -> &'static str {
        "buslogic"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        out.put_bool(self.intx_disabled);
        out.put_u8(self.interrupt_line);
        put_state(out, &self.state);
        self.bus.save(out);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let (intx_disabled, interrupt_line) = (input.take_bool()?, input.take_u8()?);
        let state = take_state(&mut input)?;
        let targets = self.bus.load(&mut input)?;
        input.finish()?;
        self.bus.restore(targets);
        (self.state, self.intx_disabled, self.interrupt_line) = (state, intx_disabled, interrupt_line);
        // Not `sync`: what waits for mailboxes goes on with the guest.
        self.update_line();
        Ok(())
    }
}
