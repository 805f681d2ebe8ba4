//! Saved state of the interrupt controllers (version 1 of the units `apic` and `ioapic`).
//!
//! Input levels are saved too: devices that set their lines again on loading then make no new edges.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pdm::Device;
use ssm::{Error, Reader, Saveable, Writer};

use crate::local::{self, Vectors};
use crate::spec::{Icr, Lvt, Redirection, base};
use crate::{Apic, ioapic};

const VERSION: u32 = 1;

/// All local APICs as one unit.
pub(crate) struct LocalApics(pub(crate) Arc<Apic>);
/// The I/O APIC as a unit.
pub(crate) struct IoApic(pub(crate) Arc<Apic>);

fn put_vectors(out: &mut Writer, vectors: &Vectors) {
    for word in vectors.0 {
        out.put_u64(word);
    }
}

fn take_vectors(input: &mut Reader<'_>) -> Result<Vectors, Error> {
    let mut words = [0; 4];
    for word in &mut words {
        *word = input.take_u64()?;
    }
    Ok(Vectors(words))
}

fn save_local(state: &local::State, out: &mut Writer) {
    let local::State {
        id,
        base,
        tpr,
        ldr,
        dfr,
        svr,
        esr,
        errors,
        icr,
        lvt,
        initial_count,
        divide,
        expires,
        tsc_deadline,
        irr,
        isr,
        tmr,
        lint,
        extint,
    } = state;
    out.put_u32(*id);
    out.put_u64(*base);
    out.put_u8(*tpr);
    out.put_u8(*ldr);
    out.put_u8(*dfr);
    out.put_u32(*svr);
    out.put_u32(*esr);
    out.put_u32(*errors);
    out.put_u64(icr.into_bits());
    for entry in lvt {
        out.put_u32(entry.into_bits());
    }
    out.put_u32(*initial_count);
    out.put_u8(*divide);
    out.put_bool(expires.is_some());
    out.put_u64(expires.unwrap_or(0));
    out.put_u64(*tsc_deadline);
    put_vectors(out, irr);
    put_vectors(out, isr);
    put_vectors(out, tmr);
    out.put_bool(lint[0]);
    out.put_bool(lint[1]);
    out.put_bool(*extint);
}

fn load_local(input: &mut Reader<'_>, id: u32, apic: &Apic) -> Result<local::State, Error> {
    if input.take_u32()? != id {
        return Err(input.invalid(format!("local APIC {id} is missing")));
    }
    let mut state = local::State::new(id, apic.config.local_apic);
    state.base = input.take_u64()?;
    let known = base::ADDRESS | base::ENABLE | base::X2APIC | base::BSP;
    let mode = state.base & (base::ENABLE | base::X2APIC);
    if state.base & !known != 0
        || mode == base::X2APIC
        || (mode != 0 && !apic.config.local_apic)
        || (mode & base::X2APIC != 0 && !apic.config.x2apic)
    {
        return Err(input.invalid(format!("local APIC {id} has the base 0x{:x}", state.base)));
    }
    state.tpr = input.take_u8()?;
    state.ldr = input.take_u8()?;
    state.dfr = input.take_u8()? & 0xf;
    state.svr = input.take_u32()?;
    state.esr = input.take_u32()?;
    state.errors = input.take_u32()?;
    state.icr = Icr::from_bits(input.take_u64()?);
    for entry in &mut state.lvt {
        *entry = Lvt::from_bits(input.take_u32()?);
    }
    state.initial_count = input.take_u32()?;
    state.divide = input.take_u8()?;
    let armed = input.take_bool()?;
    let expires = input.take_u64()?;
    state.expires = armed.then_some(expires);
    state.tsc_deadline = input.take_u64()?;
    state.irr = take_vectors(input)?;
    state.isr = take_vectors(input)?;
    state.tmr = take_vectors(input)?;
    state.lint = [input.take_bool()?, input.take_bool()?];
    state.extint = input.take_bool()?;
    Ok(state)
}

impl Saveable for LocalApics {
    fn unit_name(&self) -> &'static str {
        "apic"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        out.put_u32(self.0.locals.len() as u32);
        for local in &self.0.locals {
            save_local(&local.state.lock(), out);
        }
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, VERSION)?;
        let apic = &self.0;
        if input.take_u32()? as usize != apic.locals.len() {
            return Err(input.invalid("the machine has another number of CPUs than the saved state"));
        }
        let mut states = Vec::with_capacity(apic.locals.len());
        for id in 0..apic.locals.len() as u32 {
            states.push(load_local(&mut input, id, apic)?);
        }
        input.finish()?;
        for (local, new) in apic.locals.iter().zip(states) {
            let mut state = local.state.lock();
            *state = new;
            local.replaced.store(true, Ordering::SeqCst);
            apic.sync(local, &state);
            apic.arm(local, &state);
        }
        apic.remap();
        Ok(())
    }
}

impl Device for LocalApics {
    fn reset(&mut self) {
        self.0.reset_locals();
    }
}

impl Saveable for IoApic {
    fn unit_name(&self) -> &'static str {
        "ioapic"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        let ioapic::State { id, index, table, levels } = &*self.0.io.lock();
        out.put_u8(*id);
        out.put_u8(*index);
        for entry in table {
            out.put_u64(entry.into_bits());
        }
        out.put_u32(*levels);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, VERSION)?;
        let id = input.take_u8()? & 0xf;
        let index = input.take_u8()?;
        let mut table = [Redirection::new(); ioapic::PINS];
        for entry in &mut table {
            *entry = Redirection::from_bits(input.take_u64()? & Redirection::DEFINED);
        }
        let levels = input.take_u32()? & ((1 << ioapic::PINS) - 1);
        input.finish()?;
        let mut io = self.0.io.lock();
        *io = ioapic::State { id, index, table, levels };
        self.0.tell_routes(&io);
        Ok(())
    }
}

impl Device for IoApic {
    fn reset(&mut self) {
        let mut io = self.0.io.lock();
        io.reset();
        self.0.tell_routes(&io);
    }
}
