//! Saved state of the AHCI controller, version 1: the global registers, and registers and drive of each port. Commands under way are
//! not part of it: they have ended when it is taken.

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::Ahci;
use super::port::{Failed, Regs};
use super::spec::{Ghc, LINK_UP, SLOTS};
use crate::ide::channel::{Phase, State};
use crate::ide::saved::{put_channel, take_channel};

const VERSION: u32 = 1;

fn put_regs(out: &mut Writer, regs: &Regs) {
    let Regs { clb, fb, is, ie, cmd, tfd, sig, ssts, sctl, serr, sact, ci, halted, signature_due, failed } =
        regs;
    out.put_u64(*clb);
    out.put_u64(*fb);
    for value in [*is, *ie, *cmd, *tfd, *sig, *ssts, *sctl, *serr, *sact, *ci] {
        out.put_u32(value);
    }
    out.put_bool(*halted);
    out.put_bool(*signature_due);
    out.put_bool(failed.is_some());
    if let Some(Failed { tag, status, error, lba }) = failed {
        out.put_bytes(&[*tag, *status, *error]);
        out.put_u64(*lba);
    }
}

fn take_regs(input: &mut Reader<'_>) -> Result<Regs, Error> {
    let (clb, fb) = (input.take_u64()?, input.take_u64()?);
    let mut words = [0; 10];
    for word in &mut words {
        *word = input.take_u32()?;
    }
    let [is, ie, cmd, tfd, sig, ssts, sctl, serr, sact, ci] = words;
    if clb & 0x3ff != 0 || fb & 0xff != 0 {
        return Err(input.invalid("command list or FIS area is not aligned"));
    }
    let (halted, signature_due) = (input.take_bool()?, input.take_bool()?);
    let failed = if input.take_bool()? {
        let (tag, status, error) = (input.take_u8()?, input.take_u8()?, input.take_u8()?);
        if tag >= SLOTS {
            return Err(input.invalid("tag of a failed command"));
        }
        Some(Failed { tag, status, error, lba: input.take_u64()? })
    } else {
        None
    };
    Ok(Regs { clb, fb, is, ie, cmd, tfd, sig, ssts, sctl, serr, sact, ci, halted, signature_due, failed })
}

fn take_port(input: &mut Reader<'_>, present: bool) -> Result<(Regs, State), Error> {
    if input.take_bool()? != present {
        return Err(input.invalid("a port has a drive in one of saved state and machine only"));
    }
    let regs = take_regs(input)?;
    if regs.ssts == LINK_UP && !present {
        return Err(input.invalid("a port without a drive has a link"));
    }
    let state = take_channel(input)?;
    if state.phase != Phase::Idle || state.selected != 0 || state.active != 0 {
        return Err(input.invalid("it was taken while a disk command was under way"));
    }
    Ok((regs, state))
}

impl Saveable for Ahci {
    fn unit_name(&self) -> &'static str {
        "ahci"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        if !self.is_idle() {
            tracing::error!(target: "ahci", "saved while a disk request is under way: the state cannot be restored");
        }
        out.put_u8(self.ports.len() as u8);
        out.put_u32(self.ghc.into());
        out.put_u32(self.is);
        out.put_bool(self.intx_disabled);
        for port in &self.ports {
            out.put_bool(port.is_present());
            put_regs(out, &port.regs);
            put_channel(out, &port.channel.state);
        }
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let count = usize::from(input.take_u8()?);
        if count != self.ports.len() {
            return Err(input.invalid(format!(
                "it has {count} ports, the machine's controller has {}",
                self.ports.len()
            )));
        }
        let ghc = Ghc::from(input.take_u32()?);
        let is = input.take_u32()?;
        let intx_disabled = input.take_bool()?;
        let states = self
            .ports
            .iter()
            .map(|port| take_port(&mut input, port.is_present()))
            .collect::<Result<Vec<_>, _>>()?;
        input.finish()?;
        for (port, (regs, state)) in self.ports.iter_mut().zip(states) {
            port.restore(regs, state);
        }
        self.ghc = Ghc::new().with_ae(true).with_ie(ghc.ie());
        self.is = is;
        self.intx_disabled = intx_disabled;
        self.update_interrupt();
        // Commands that waited in the list go on.
        for number in 0..self.ports.len() {
            self.sync(number);
        }
        Ok(())
    }
}
