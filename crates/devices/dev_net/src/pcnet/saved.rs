//! Saved state, version 1: MAC address, address PROM, registers, rings, cable, the software timer and frames not yet sent.

use std::collections::VecDeque;

use ssm::{Error, Reader, Saveable, Writer, check_version};

use super::spec::{bcr, csr};
use super::{MAX_FRAME, MAX_RING, Pcnet, Ring, State};

const VERSION: u32 = 1;
/// Frames that may wait: one is sent at a time.
const MAX_PENDING: u32 = 16;

impl Saveable for Pcnet {
    fn unit_name(&self) -> &'static str {
        "pcnet"
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        let State { prom, rap, csr, bcr, phy, seen, rx, tx, upper, link, software, pending } = &self.state;
        out.put_bytes(&self.mac);
        out.put_bytes(prom);
        out.put_u8(*rap);
        csr.iter().chain(bcr).for_each(|value| out.put_u16(*value));
        out.put_u16(*phy);
        out.put_u16(*seen);
        for Ring { base, len, left } in [rx, tx] {
            out.put_u32(*base);
            out.put_u16(*len);
            out.put_u16(*left);
        }
        out.put_u32(*upper);
        out.put_bool(*link);
        out.put_bool(software.is_some());
        out.put_u64(software.unwrap_or(0));
        out.put_u32(pending.len() as u32);
        pending.iter().for_each(|frame| out.put_blob(frame));
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        check_version(&input, VERSION)?;
        let mut mac = [0; 6];
        input.take_into(&mut mac)?;
        if mac != self.mac {
            return Err(input.invalid("the network card has another MAC address"));
        }
        let mut prom = [0; 16];
        input.take_into(&mut prom)?;
        let rap = input.take_u8()?;
        let (mut csr, mut bcr) = ([0; csr::COUNT], [0; bcr::COUNT]);
        for value in csr.iter_mut().chain(&mut bcr) {
            *value = input.take_u16()?;
        }
        let (phy, seen) = (input.take_u16()?, input.take_u16()?);
        let mut rings = [Ring::POWER_ON; 2];
        for ring in &mut rings {
            *ring = Ring { base: input.take_u32()?, len: input.take_u16()?, left: input.take_u16()? };
            if !(1..=MAX_RING).contains(&ring.len) || !(1..=ring.len).contains(&ring.left) {
                return Err(input.invalid(format!("descriptor {} of a ring of {}", ring.left, ring.len)));
            }
        }
        let (upper, link) = (input.take_u32()?, input.take_bool()?);
        let (runs, due) = (input.take_bool()?, input.take_u64()?);
        if usize::from(rap) >= csr::COUNT || upper & 0xff_ffff != 0 {
            return Err(input.invalid("register address or address base"));
        }
        let count = input.take_u32()?;
        if count > MAX_PENDING {
            return Err(input.invalid(format!("{count} frames wait to be sent")));
        }
        let mut pending = VecDeque::new();
        for _ in 0..count {
            pending.push_back(input.take_blob(MAX_FRAME)?.to_vec());
        }
        input.finish()?;
        let [rx, tx] = rings;
        let software = runs.then_some(due);
        self.state = State { prom, rap, csr, bcr, phy, seen, rx, tx, upper, link, software, pending };
        self.software.set(software);
        self.level = false;
        self.wiring.irq.set(false);
        self.update_irq();
        // Frames that wait go on their way when time runs again.
        self.more = None;
        self.poll.arm(self.poll.clock().now());
        Ok(())
    }
}
