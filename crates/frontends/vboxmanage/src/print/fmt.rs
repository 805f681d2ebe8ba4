//! Small pieces of text: labelled values, machine-readable strings, points in time.

use std::fmt::Write;

/// Which of the two languages of `showvminfo` is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people: label and value in columns.
    Human,
    /// For programs: `key=value`, text quoted.
    Machine,
}

/// Text under construction.
pub struct Page {
    pub text: String,
    pub form: Form,
}

impl Page {
    pub fn new(form: Form) -> Self {
        Self { text: String::new(), form }
    }

    pub fn is_machine(&self) -> bool {
        self.form == Form::Machine
    }

    /// A line as it is.
    pub fn line(&mut self, line: impl AsRef<str>) {
        self.text.push_str(line.as_ref());
        self.text.push('\n');
    }

    /// A text value: `key="value"`, or the label (which ends in a colon) and the value.
    pub fn string(&mut self, key: &str, label: &str, value: &str) {
        match self.form {
            Form::Machine => self.quoted(key, value),
            Form::Human => self.label(label, value),
        }
    }

    /// A value with a name of its own in each language.
    pub fn word(&mut self, key: &str, label: &str, (machine, human): (&str, &str)) {
        match self.form {
            Form::Machine => self.quoted(key, machine),
            Form::Human => self.label(label, human),
        }
    }

    /// `on` and `off`, or `enabled` and `disabled`.
    pub fn switch(&mut self, key: &str, label: &str, on: bool) {
        self.choice(key, label, on, "enabled", "disabled");
    }

    /// `on` and `off`, or the given words.
    pub fn choice(&mut self, key: &str, label: &str, on: bool, yes: &str, no: &str) {
        let machine = if on { "on" } else { "off" };
        self.word(key, label, (machine, if on { yes } else { no }));
    }

    /// A number with a unit that only people are told.
    pub fn number(&mut self, key: &str, label: &str, value: u32, unit: &str) {
        match self.form {
            Form::Machine => self.line(format!("{key}={value}")),
            Form::Human => self.label(label, &format!("{value}{unit}")),
        }
    }

    /// `key="value"`.
    pub fn quoted(&mut self, key: &str, value: &str) {
        let value = escape(value);
        let _ = writeln!(self.text, "{key}=\"{value}\"");
    }

    /// `"key"="value"`, for keys that carry names of the user's.
    pub fn quoted_key(&mut self, key: &str, value: &str) {
        let (key, value) = (escape(key), escape(value));
        let _ = writeln!(self.text, "\"{key}\"=\"{value}\"");
    }

    /// A label of 28 columns and a value.
    pub fn label(&mut self, label: &str, value: &str) {
        let _ = writeln!(self.text, "{label:<28} {value}");
    }
}

/// Puts a backslash before quotes and backslashes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A number in groups of three digits.
pub fn grouped(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let mut out = String::new();
    if value < 0 {
        out.push('-');
    }
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `2026-11-23T06:14:40.123000000Z`, from milliseconds since 1970 in UTC.
pub fn timestamp(millis: i64) -> String {
    let (days, rest) = (millis.div_euclid(86_400_000), millis.rem_euclid(86_400_000));
    let (year, month, day) = civil(days);
    let (seconds, millis) = (rest / 1000, rest % 1000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}000000Z")
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar. Years are counted
/// from March here, so that the leap day is the last one.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_PER_ERA: i64 = 146_097;
    let days = days + 719_468;
    let era = days.div_euclid(DAYS_PER_ERA);
    let day_of_era = days.rem_euclid(DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_utc() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(timestamp(1_709_210_096_789), "2024-02-29T12:34:56.789000000Z");
        assert_eq!(timestamp(-1), "1969-12-31T23:59:59.999000000Z");
        assert_eq!(timestamp(4_102_444_799_000), "2099-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn machine_strings_escape_quotes_and_backslashes() {
        let mut page = Page::new(Form::Machine);
        page.quoted("k", "a\"b\\c");
        page.quoted_key("IDE \"x\"-0-0", "v");
        assert_eq!(page.text, "k=\"a\\\"b\\\\c\"\n\"IDE \\\"x\\\"-0-0\"=\"v\"\n");
    }

    #[test]
    fn digits_come_in_groups() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(-3_600_000), "-3,600,000");
        assert_eq!(grouped(123), "123");
    }
}
