//! Guest properties.

use std::time::{SystemTime, UNIX_EPOCH};

use super::fmt::timestamp;
use crate::parse::guest::Enumerate;

/// A guest property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    pub name: String,
    pub value: String,
    /// Nanoseconds since 1970.
    pub timestamp: i64,
    pub flags: String,
}

/// The list, in the form of 7.0 or, if asked for, of versions before.
pub fn property_table(all: &[Property], form: &Enumerate) -> String {
    if all.is_empty() {
        return "No properties found.\n".into();
    }
    if form.old_format {
        let line = |p: &Property| {
            format!("Name: {}, value: {}, timestamp: {}, flags: {}\n", p.name, p.value, p.timestamp, p.flags)
        };
        return all.iter().map(line).collect();
    }
    let width = |text: fn(&Property) -> &str, most: usize| {
        all.iter().map(|p| text(p).chars().count()).max().unwrap_or(1).clamp(1, most)
    };
    let names = width(|p| &p.name, 48);
    let values = width(|p| &p.value, 28);
    let mut out = String::new();
    for p in all {
        let line = format!("{:<names$} = '{}'", p.name, p.value);
        let flags = if form.flags { p.flags.as_str() } else { "" };
        out.push_str(&line);
        if form.timestamp || !flags.is_empty() {
            let used = line.chars().count();
            let padding = (names + values + 6).saturating_sub(used).max(1);
            out.push_str(&" ".repeat(padding));
            if form.timestamp {
                out.push_str(&format!("@ {}", time(p.timestamp, form.relative)));
            }
            if !flags.is_empty() {
                out.push_str(&format!(" {flags}"));
            }
        }
        out.push('\n');
    }
    out
}

fn time(nanoseconds: i64, relative: bool) -> String {
    let millis = nanoseconds.div_euclid(1_000_000);
    if relative {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
        return format!("{:.3}s", (now - millis) as f64 / 1000.0);
    }
    // Three digits of the second are enough here.
    timestamp(millis).replace("000000Z", "Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_entries() {
        let property = |name: &str, value: &str, flags: &str| Property {
            name: name.into(),
            value: value.into(),
            timestamp: 1_700_000_000_123_456_789,
            flags: flags.into(),
        };
        let all = [property("/a", "1", ""), property("/long/name", "value", "TRANSIENT, RDONLYGUEST")];
        let mut form = Enumerate {
            vm: String::new(),
            patterns: String::new(),
            old_format: false,
            sort: true,
            timestamp: true,
            relative: false,
            flags: true,
        };
        assert_eq!(
            property_table(&all, &form),
            "/a         = '1'     @ 2023-11-14T22:13:20.123Z\n\
             /long/name = 'value' @ 2023-11-14T22:13:20.123Z TRANSIENT, RDONLYGUEST\n"
        );
        form.old_format = true;
        assert_eq!(
            property_table(&all[..1], &form),
            "Name: /a, value: 1, timestamp: 1700000000123456789, flags: \n"
        );
        assert_eq!(property_table(&[], &form), "No properties found.\n");
    }
}
