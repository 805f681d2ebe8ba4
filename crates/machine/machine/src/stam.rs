//! STAM, the statistics manager: what is counted, by name, as `VBoxManage debugvm VM statistics` prints it.

use std::collections::HashMap;
use std::fmt::Write as _;

use parking_lot::Mutex;

/// A counter's name and value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Like a path: `/EM/CPU0/BlocksTranslated`.
    pub name: String,
    /// What it counts, in words.
    pub description: String,
    /// `count` or `bytes`.
    pub unit: &'static str,
    pub value: u64,
}

impl Sample {
    /// A counter of a vCPU's engine. Engines name them in words.
    pub fn of_engine(cpu: usize, (words, value): (&'static str, u64)) -> Self {
        let mut name = format!("/EM/CPU{cpu}/");
        for word in words.split(|c: char| !c.is_alphanumeric()) {
            let mut letters = word.chars();
            name.extend(letters.next().map(|c| c.to_ascii_uppercase()));
            name.push_str(letters.as_str());
        }
        let unit = if words.contains("bytes") { "bytes" } else { "count" };
        Self { name, description: words.to_owned(), unit, value }
    }
}

/// Counts anew from the last reset of each counter on; the counters themselves go on.
#[derive(Default)]
pub struct Baseline(Mutex<HashMap<String, u64>>);

impl Baseline {
    /// The values since the last reset.
    pub fn since(&self, mut samples: Vec<Sample>) -> Vec<Sample> {
        let base = self.0.lock();
        for sample in &mut samples {
            sample.value = sample.value.saturating_sub(base.get(&sample.name).copied().unwrap_or(0));
        }
        samples
    }

    /// Has the samples whose names match `pattern` count from here.
    pub fn reset(&self, samples: Vec<Sample>, pattern: &str) {
        let mut base = self.0.lock();
        for sample in samples.into_iter().filter(|s| matches(pattern, &s.name)) {
            base.insert(sample.name, sample.value);
        }
    }
}

/// VirtualBox's form, which is XML: an element for each sample.
pub fn snapshot(samples: &[Sample], pattern: &str, descriptions: bool) -> String {
    let mut text = "<Statistics>\n".to_owned();
    for sample in samples.iter().filter(|s| matches(pattern, &s.name)) {
        // Writing to a string cannot fail.
        let _ =
            write!(text, "<Counter c=\"{}\" unit=\"{}\" name=\"{}\"", sample.value, sample.unit, sample.name);
        if descriptions {
            let _ = write!(text, " desc=\"{}\"", escaped(&sample.description));
        }
        text.push_str("/>\n");
    }
    text.push_str("</Statistics>\n");
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Whether a name matches one of the patterns that `|` separates; `*` stands for anything, `?` for a character, empty
/// matches all.
fn matches(pattern: &str, name: &str) -> bool {
    fn one(pattern: &[u8], name: &[u8]) -> bool {
        // Where to go on after the latest star, so that time stays within the product of the lengths.
        let (mut p, mut n, mut star) = (0, 0, None);
        while n < name.len() {
            match pattern.get(p) {
                Some(b'*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(c) if *c == name[n] || *c == b'?' => {
                    p += 1;
                    n += 1;
                }
                _ => match star {
                    Some((at, from)) => {
                        star = Some((at, from + 1));
                        p = at + 1;
                        n = from + 1;
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|c| *c == b'*')
    }
    pattern.is_empty() || pattern.split('|').any(|p| one(p.as_bytes(), name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_stars_and_alternatives() {
        assert!(matches("", "/EM/CPU0/Instructions"));
        assert!(matches("/EM/*", "/EM/CPU0/Instructions"));
        assert!(matches("/PGM/*|/EM/CPU?/Ins*s", "/EM/CPU0/Instructions"));
        assert!(matches("*CPU0*", "/EM/CPU0/Instructions"));
        assert!(!matches("/PGM/*", "/EM/CPU0/Instructions"));
        assert!(!matches("/EM/*x", "/EM/CPU0/Instructions"));
        assert!(!matches("/EM/CPU0/Instructions?", "/EM/CPU0/Instructions"));
    }

    #[test]
    fn counters_are_named_by_their_words_and_printed_as_xml() {
        let samples =
            [Sample::of_engine(0, ("bytes translated", 7)), Sample::of_engine(1, ("TLB flushes", 3))];
        assert_eq!(
            snapshot(&samples, "", true),
            "<Statistics>\n\
             <Counter c=\"7\" unit=\"bytes\" name=\"/EM/CPU0/BytesTranslated\" desc=\"bytes translated\"/>\n\
             <Counter c=\"3\" unit=\"count\" name=\"/EM/CPU1/TLBFlushes\" desc=\"TLB flushes\"/>\n\
             </Statistics>\n"
        );
        assert_eq!(
            snapshot(&samples, "*/CPU1/*", false),
            "<Statistics>\n<Counter c=\"3\" unit=\"count\" name=\"/EM/CPU1/TLBFlushes\"/>\n</Statistics>\n"
        );
    }

    #[test]
    fn a_reset_starts_the_matching_counters_at_zero() {
        let baseline = Baseline::default();
        let now =
            |value| vec![Sample::of_engine(0, ("exits", value)), Sample::of_engine(1, ("exits", value))];
        baseline.reset(now(10), "/EM/CPU0/*");
        let values: Vec<_> = baseline.since(now(15)).iter().map(|s| s.value).collect();
        assert_eq!(values, [5, 15]);
    }
}
