//! Guest properties: named texts that host and guest share.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::CallTable;
use settings::{GuestProperty, MachineSettings};
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::calls_machine::{look, target};
use crate::svc::{Context, Lock, State, Svc};
use crate::view::gone;

/// Bytes of a name, its end included, as the guest's interface has it.
const MAX_NAME: usize = 64;
/// Bytes of a value.
const MAX_VALUE: usize = 1024;
/// Properties of one machine.
const MAX_COUNT: usize = 1024;

/// Every flag; a property may have several.
const FLAGS: [&str; 5] = ["TRANSIENT", "RDONLYGUEST", "RDONLYHOST", "READONLY", "TRANSRESET"];

pub(crate) fn add(t: &mut CallTable<Context>) {
    t.add(IMachine::GetGuestProperty, |c, (name,)| {
        look(c, |v| {
            let found = v.settings.hardware.guest_properties.iter().find(|p| p.name == name);
            Ok(found.map_or_else(Default::default, |p| {
                (p.value.clone(), i64::try_from(p.timestamp).unwrap_or(i64::MAX), p.flags.clone())
            }))
        })
    })
    .add(IMachine::SetGuestProperty, |c, (name, value, flags)| change(c, &name, &value, Some(&flags)))
    .add(IMachine::SetGuestPropertyValue, |c, (name, value)| change(c, &name, &value, None))
    .add(IMachine::DeleteGuestProperty, |c, (name,)| change(c, &name, "", None))
    .add(IMachine::EnumerateGuestProperties, |c, (patterns,)| {
        look(c, |v| {
            let all = v.settings.hardware.guest_properties.iter().filter(|p| matches(&patterns, &p.name));
            let (mut names, mut values, mut times, mut flags) = (vec![], vec![], vec![], vec![]);
            for property in all {
                names.push(property.name.clone());
                values.push(property.value.clone());
                times.push(i64::try_from(property.timestamp).unwrap_or(i64::MAX));
                flags.push(property.flags.clone());
            }
            Ok((names, values, times, flags))
        })
    });
}

/// Whether `name` matches one of the patterns that commas or bars separate; no pattern matches everything.
pub(crate) fn matches(patterns: &str, name: &str) -> bool {
    fn one(pattern: &[u8], name: &[u8]) -> bool {
        // Back to the last star on a mismatch: linear in the pattern for each start.
        let (mut p, mut n) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    star = Some((p + 1, n));
                    p += 1;
                }
                Some(c) if *c == b'?' || *c == name[n] => {
                    p += 1;
                    n += 1;
                }
                _ => match star {
                    Some((after, at)) => {
                        p = after;
                        n = at + 1;
                        star = Some((after, n));
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|c| *c == b'*')
    }
    patterns.is_empty() || patterns.split(['|', ',']).any(|p| one(p.trim().as_bytes(), name.as_bytes()))
}

/// `flags` in the order and spelling in which VirtualBox stores them.
fn check_flags(flags: &str) -> ApiResult<String> {
    let mut given = Vec::new();
    for word in flags.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        let known = FLAGS.iter().find(|f| f.eq_ignore_ascii_case(word));
        given.push(*known.ok_or_else(|| {
            ApiError::invalid_arg(format!("Invalid guest property flag values: '{flags}'"))
        })?);
    }
    // Reset with the guest means gone with it, too.
    if given.contains(&"TRANSRESET") {
        given.push("TRANSIENT");
    }
    Ok(FLAGS.iter().filter(|f| given.contains(f)).copied().collect::<Vec<_>>().join(", "))
}

fn change(c: &Context, name: &str, value: &str, flags: Option<&str>) -> ApiResult<()> {
    let (reference, _) = target(c)?;
    if name.is_empty() || name.len() >= MAX_NAME || name.contains(['*', '?', '|', ',']) {
        return Err(ApiError::invalid_arg(format!("Invalid guest property name '{name}'")));
    }
    if value.len() >= MAX_VALUE || value.contains(|ch: char| ch.is_control()) {
        return Err(ApiError::invalid_arg(format!("Invalid value of the guest property '{name}'")));
    }
    let flags = flags.map(check_flags).transpose()?;
    let mut state = c.svc.state.lock();
    let machine = state.resolve(c.peer.id, reference)?;
    if let Some(error) = &machine.access_error {
        return Err(error.clone());
    }
    let id = machine.id;
    if !state.machines.contains_key(&id) {
        return Err(ApiError::new(
            ResultCode::InvalidObjectState,
            "The machine must be registered before it gets guest properties",
        ));
    }
    c.svc.set_guest_property(&mut state, id, name, value, flags)
}

impl Svc {
    /// Stores a property at once, in the committed settings and in a lock's copy.
    fn set_guest_property(
        &self,
        state: &mut State,
        id: Uuid,
        name: &str,
        value: &str,
        flags: Option<String>,
    ) -> ApiResult<()> {
        let machine = state.machine_mut(id)?;
        let known = machine.settings.hardware.guest_properties.iter().find(|p| p.name == name);
        if known.is_some_and(|p| p.flags.contains("RDONLYHOST") || p.flags.contains("READONLY")) {
            return Err(ApiError::new(
                ResultCode::AccessDenied,
                format!("Property '{name}' cannot be changed by the host"),
            ));
        }
        if known.is_none() && machine.settings.hardware.guest_properties.len() >= MAX_COUNT {
            return Err(ApiError::new(
                ResultCode::MaximumReached,
                "The machine has too many guest properties",
            ));
        }
        let deleted = value.is_empty();
        let flags = flags.unwrap_or_else(|| known.map(|p| p.flags.clone()).unwrap_or_default());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let property = GuestProperty {
            name: name.to_owned(),
            value: value.to_owned(),
            timestamp: u64::try_from(now).unwrap_or(u64::MAX),
            flags: flags.clone(),
        };
        let set = |s: &MachineSettings| {
            let mut s = s.clone();
            let all = &mut s.hardware.guest_properties;
            all.retain(|p| p.name != name);
            if !deleted {
                all.push(property.clone());
                all.sort_by(|a, b| a.name.cmp(&b.name));
            }
            Arc::new(s)
        };
        let updated = set(&machine.settings);
        machine.store.as_mut().ok_or_else(gone)?.save(&updated)?;
        machine.settings = updated;
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = set(&held.copy);
        }
        state.emit(
            IEventSource::OnGuestPropertyChanged,
            (id.to_string(), name.to_owned(), value.to_owned(), flags, deleted),
        );
        Ok(())
    }
}

/// The machine is off: properties that live only as long as it runs go.
pub(crate) fn drop_transient(settings: &Arc<MachineSettings>) -> Arc<MachineSettings> {
    let transient = |p: &GuestProperty| p.flags.contains("TRANS");
    if !settings.hardware.guest_properties.iter().any(transient) {
        return settings.clone();
    }
    let mut kept = (**settings).clone();
    kept.hardware.guest_properties.retain(|p| !transient(p));
    Arc::new(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_stars_question_marks_and_alternatives() {
        assert!(matches("", "/a"));
        assert!(matches("/VirtualBox/*", "/VirtualBox/GuestInfo/OS"));
        assert!(matches("x|*/OS", "/VirtualBox/GuestInfo/OS"));
        assert!(matches("a,/?", "/b"));
        assert!(!matches("/?", "/bc"));
        assert!(!matches("*a*b", "ba"));
    }

    #[test]
    fn flags_are_put_into_order() {
        assert_eq!(check_flags("rdonlyguest, TRANSIENT").unwrap(), "TRANSIENT, RDONLYGUEST");
        assert_eq!(check_flags("").unwrap(), "");
        assert!(check_flags("FROZEN").is_err());
    }
}
