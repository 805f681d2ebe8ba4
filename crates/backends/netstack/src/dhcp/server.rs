//! The server: what is answered to whom, and which address a client gets.

use std::net::Ipv4Addr;

use super::leases::{Lease, LeaseState, Leases};
use super::packet::{self, Incoming};
use super::wire::{Answer, Kind, Request, code};
use super::{Condition, ConditionKind, Config, ConfigError, DEFAULT_TIMES, Scope, matches_pattern};
use crate::mac::Mac;

/// Seconds for which an address that a client found to be taken is given to nobody.
const DECLINED: i64 = 600;

/// A network's DHCP server.
#[derive(Debug)]
pub struct Server {
    config: Config,
    mac: Mac,
    leases: Leases,
    /// Addresses that somebody else uses, and until when that is believed.
    declined: Vec<(Ipv4Addr, i64)>,
    /// The leases differ from the file's.
    changed: bool,
}

/// What a client says of itself that decides on what it gets.
struct Who<'a> {
    mac: Mac,
    id: Option<&'a [u8]>,
    vendor: Option<&'a [u8]>,
    user: Option<&'a [u8]>,
}

impl Server {
    /// `leases` are those of an earlier run; the ones that the configuration has no room for are dropped.
    pub fn new(config: Config, mac: Mac, leases: Leases) -> Result<Self, ConfigError> {
        config.check()?;
        let mut server = Self { config, mac, leases, declined: Vec::new(), changed: false };
        server.drop_foreign();
        Ok(server)
    }

    /// Takes over another configuration. Leases that fit into it stay.
    pub fn reconfigure(&mut self, config: Config) -> Result<(), ConfigError> {
        config.check()?;
        self.config = config;
        self.drop_foreign();
        Ok(())
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn mac(&self) -> Mac {
        self.mac
    }

    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Whether the leases are to be written; they count as written then.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn drop_foreign(&mut self) {
        let config = &self.config;
        let fixed = |a: Ipv4Addr| config.clients.iter().any(|c| c.fixed == Some(a));
        self.leases
            .retain(|l| config.contains(l.address) && l.address != config.address && !fixed(l.address));
    }

    /// Answers a frame. `now` is in seconds since 1970.
    pub fn receive(&mut self, frame: &[u8], now: i64) -> Option<Vec<u8>> {
        match packet::incoming(frame, self.mac, self.config.address) {
            Incoming::Answer(frame) => Some(frame),
            Incoming::Dhcp(message) => {
                let request = Request::parse(message)?;
                let answer = self.serve(&request, now)?;
                Some(self.frame(&request, &answer))
            }
            Incoming::Other => None,
        }
    }

    /// Where the answer goes: RFC 2131, section 4.1.
    fn frame(&self, request: &Request, answer: &Answer) -> Vec<u8> {
        let all = (Mac::BROADCAST, Ipv4Addr::BROADCAST);
        let to = if answer.kind == Kind::Nak {
            all
        } else if !request.client.is_unspecified() {
            (request.mac, request.client)
        } else if request.broadcast {
            all
        } else {
            (request.mac, answer.yours)
        };
        packet::dhcp((self.mac, self.config.address), to, &answer.bytes(request))
    }

    fn serve(&mut self, request: &Request, now: i64) -> Option<Answer> {
        // Group addresses have no client, and relays do not exist here.
        if request.mac.is_group() || !request.relay.is_unspecified() {
            return None;
        }
        self.leases.expire(now);
        self.declined.retain(|(_, until)| *until > now);
        let who = Who {
            mac: request.mac,
            id: request.option(code::CLIENT_ID).filter(|id| !id.is_empty()),
            vendor: request.option(code::VENDOR_CLASS),
            user: request.option(code::USER_CLASS),
        };
        let for_another = request.address(code::SERVER).is_some_and(|s| s != self.config.address);
        if for_another {
            if request.kind == Kind::Request {
                self.withdraw_offer(&who);
            }
            return None;
        }
        match request.kind {
            Kind::Discover => self.discover(request, &who, now),
            Kind::Request => self.request(request, &who, now),
            Kind::Inform => self.inform(request, &who),
            Kind::Decline => {
                self.decline(request, &who, now);
                None
            }
            Kind::Release => {
                self.release(request, &who);
                None
            }
            Kind::Offer | Kind::Ack | Kind::Nak => None,
        }
    }

    fn discover(&mut self, request: &Request, who: &Who<'_>, now: i64) -> Option<Answer> {
        let at_once = request.option(code::RAPID_COMMIT).is_some();
        let wanted = request.address(code::REQUESTED_ADDRESS).filter(|a| self.config.contains(*a));
        let address = self.choose(who, wanted, now)?;
        let state = if at_once { LeaseState::Acked } else { LeaseState::Offered };
        let mut options = if at_once { vec![(code::RAPID_COMMIT, Vec::new())] } else { Vec::new() };
        options.extend(self.lease(request, who, address, state, now));
        let kind = if at_once { Kind::Ack } else { Kind::Offer };
        Some(self.answer(kind, address, options))
    }

    fn request(&mut self, request: &Request, who: &Who<'_>, now: i64) -> Option<Answer> {
        let asked = request.address(code::REQUESTED_ADDRESS);
        let has = Some(request.client).filter(|a| !a.is_unspecified());
        let refuse = |server: &Self, why: &str| {
            Some(server.answer(Kind::Nak, Ipv4Addr::UNSPECIFIED, vec![(code::MESSAGE, why.into())]))
        };
        let wanted = match (asked, has) {
            (Some(asked), Some(has)) if asked != has => {
                return refuse(self, "Requested address does not match ciaddr");
            }
            (asked, has) => asked.or(has)?,
        };
        match self.choose(who, Some(wanted), now) {
            Some(address) if address == wanted => {
                let options = self.lease(request, who, address, LeaseState::Acked, now);
                Some(self.answer(Kind::Ack, address, options))
            }
            // It is to begin anew.
            _ => refuse(self, "The address is not available"),
        }
    }

    fn inform(&self, request: &Request, who: &Who<'_>) -> Option<Answer> {
        if request.client.is_unspecified() {
            return None;
        }
        request.option(code::PARAMETERS)?;
        Some(self.answer(Kind::Ack, Ipv4Addr::UNSPECIFIED, self.options(request, who)))
    }

    fn decline(&mut self, request: &Request, who: &Who<'_>, now: i64) {
        let Some(address) = request.address(code::REQUESTED_ADDRESS) else { return };
        if self.leases.of_client(who.mac, who.id).is_some_and(|l| l.address == address) {
            tracing::warn!(target: "dhcp", "{address} is in use already, says {}", who.mac);
            self.leases.remove(address);
            self.declined.push((address, now.saturating_add(DECLINED)));
            self.changed = true;
        }
    }

    fn release(&mut self, request: &Request, who: &Who<'_>) {
        if let Some(lease) = self.leases.of_client(who.mac, who.id).filter(|l| l.address == request.client) {
            lease.state = LeaseState::Released;
            self.changed = true;
        }
    }

    fn withdraw_offer(&mut self, who: &Who<'_>) {
        if let Some(lease) = self.leases.of_client(who.mac, who.id).filter(|l| l.state == LeaseState::Offered)
        {
            lease.state = LeaseState::Released;
        }
    }

    /// The address that a client gets: its fixed one, the one it had, the one it wants, one that nobody had, one that was given back.
    fn choose(&mut self, who: &Who<'_>, wanted: Option<Ipv4Addr>, now: i64) -> Option<Ipv4Addr> {
        if let Some(fixed) = self.config.clients.iter().find(|c| c.mac == who.mac).and_then(|c| c.fixed) {
            return Some(fixed);
        }
        if let Some(lease) = self.leases.of_client(who.mac, who.id) {
            return Some(lease.address);
        }
        let reserved = |a: Ipv4Addr| {
            a == self.config.address
                || self.config.clients.iter().any(|c| c.fixed == Some(a))
                || self.declined.iter().any(|(d, until)| *d == a && *until > now)
        };
        let unused = |a: Ipv4Addr| self.leases.at(a).is_none_or(|l| l.state <= LeaseState::Expired);
        if let Some(wanted) = wanted
            && self.config.contains(wanted)
            && !reserved(wanted)
            && unused(wanted)
        {
            return Some(wanted);
        }
        let range = || (u32::from(self.config.lower)..=u32::from(self.config.upper)).map(Ipv4Addr::from);
        // A range may have millions of addresses; one more than there are leases and reservations always has a new one.
        let looked_at = self.leases.all().len() + self.config.clients.len() + self.declined.len() + 2;
        if let Some(new) = range().take(looked_at).find(|a| self.leases.at(*a).is_none() && !reserved(*a)) {
            return Some(new);
        }
        let left =
            self.leases.all().iter().filter(|l| l.state <= LeaseState::Expired && !reserved(l.address));
        left.min_by_key(|l| (l.state, l.expires())).map(|l| l.address)
    }

    /// Gives the client the address; what it is told of that.
    fn lease(
        &mut self,
        request: &Request,
        who: &Who<'_>,
        address: Ipv4Addr,
        state: LeaseState,
        now: i64,
    ) -> Vec<(u8, Vec<u8>)> {
        let time = self.time(request, who);
        if !self.config.clients.iter().any(|c| c.fixed == Some(address)) {
            let had = self.leases.at(address);
            // An offer takes nothing away from a client that has the address.
            let keeps = had.is_some_and(|l| l.state == LeaseState::Acked) && state == LeaseState::Offered;
            if !keeps {
                let id = who.id.map(<[u8]>::to_vec);
                self.leases.put(Lease { address, mac: who.mac, id, state, issued: now, time });
            }
            if state == LeaseState::Acked {
                tracing::info!(target: "dhcp", "{address} to {} for {time} s", who.mac);
                self.changed = true;
            }
        }
        let seconds = |s: u32| s.to_be_bytes().to_vec();
        let mut options = vec![
            (code::LEASE_TIME, seconds(time)),
            (code::RENEWAL_TIME, seconds(time / 2)),
            (code::REBINDING_TIME, seconds(time / 8 * 7 + time % 8 * 7 / 8)),
        ];
        options.extend(self.options(request, who));
        options
    }

    fn answer(&self, kind: Kind, yours: Ipv4Addr, options: Vec<(u8, Vec<u8>)>) -> Answer {
        Answer { kind, yours, server: self.config.address, options }
    }

    /// What applies to a client, the closest first.
    fn scopes(&self, who: &Who<'_>) -> Vec<&Scope> {
        let own = self.config.clients.iter().filter(|c| c.mac == who.mac).map(|c| &c.scope);
        let groups = self.config.groups.iter().filter(|g| is_member(&g.conditions, who)).map(|g| &g.scope);
        own.chain(groups).chain([&self.config.global]).collect()
    }

    fn time(&self, request: &Request, who: &Who<'_>) -> u32 {
        let scopes = self.scopes(who);
        let level = |of: fn(&Scope) -> u32, default| {
            scopes.iter().map(|s| of(s)).find(|t| *t != 0).unwrap_or(default)
        };
        let max = level(|s| s.max_time, DEFAULT_TIMES.2);
        let min = level(|s| s.min_time, DEFAULT_TIMES.0).min(max);
        let default = level(|s| s.default_time, DEFAULT_TIMES.1);
        request.number(code::LEASE_TIME).map_or(default, |asked| asked.clamp(min, max))
    }

    fn options(&self, request: &Request, who: &Who<'_>) -> Vec<(u8, Vec<u8>)> {
        let scopes = self.scopes(who);
        let mut numbers: Vec<u8> = Vec::new();
        match request.option(code::PARAMETERS).filter(|list| !list.is_empty()) {
            Some(asked) => {
                numbers.extend(asked);
                numbers.extend(scopes.iter().flat_map(|s| &s.forced));
            }
            // Who asks for nothing gets all there is.
            None => numbers.extend(scopes.iter().flat_map(|s| s.options.keys())),
        }
        let mut options = vec![(code::SUBNET_MASK, self.config.mask.octets().to_vec())];
        for number in numbers {
            if options.iter().any(|(code, _)| *code == number) {
                continue;
            }
            for scope in &scopes {
                if scope.suppressed.contains(&number) {
                    break;
                }
                if let Some(value) = scope.options.get(&number) {
                    options.push((number, value.clone()));
                    break;
                }
            }
        }
        options
    }
}

fn is_member(conditions: &[Condition], who: &Who<'_>) -> bool {
    let holds =
        |inclusive: bool| conditions.iter().filter(|c| c.inclusive == inclusive).any(|c| matches(c, who));
    holds(true) && !holds(false)
}

fn matches(condition: &Condition, who: &Who<'_>) -> bool {
    let class = |bytes: Option<&[u8]>, wildcard: bool| {
        let Some(bytes) = bytes else { return false };
        // Some clients send the zero at the end of their text.
        let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
        let text = String::from_utf8_lossy(bytes);
        if wildcard { matches_pattern(&condition.value, &text) } else { condition.value == text }
    };
    match condition.kind {
        ConditionKind::Mac => condition.value.parse() == Ok(who.mac),
        ConditionKind::MacWildcard => {
            matches_pattern(&condition.value.to_ascii_lowercase(), &who.mac.to_string())
        }
        ConditionKind::VendorClass => class(who.vendor, false),
        ConditionKind::VendorClassWildcard => class(who.vendor, true),
        ConditionKind::UserClass => class(who.user, false),
        ConditionKind::UserClassWildcard => class(who.user, true),
    }
}

#[cfg(test)]
mod tests;
