//! The option grammar of every command: IPRT's `RTGetOpt` as users know it.
//!
//! A long option takes its value as the next word or after `=` or `:`; short options can be bundled and take
//! their value attached or as the next word; an indexed option carries a decimal number between its name and
//! its value (`--nic-type1`). Options and positional words may come in any order; `--` ends the options. Long
//! options are also recognised with a single dash (`-nologo`), the spelling of old scripts.

use std::fmt;

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    Nothing,
    Text,
    /// `on` or `off`, in any case.
    OnOff,
    U32,
    I32,
    U64,
    I64,
    /// Hexadecimal, with or without `0x`.
    Hex32,
    /// `leaf[:subleaf]`, hexadecimal; a missing second number reads as all ones.
    HexPair,
    Uuid,
}

/// A value converted as its option asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Nothing,
    Text(String),
    Bool(bool),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    Pair(u32, u32),
    Uuid(uuid::Uuid),
}

impl Value {
    /// The text of a [`Want::Text`] option; empty for any other kind.
    pub fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            _ => String::new(),
        }
    }

    /// The number of a [`Want::U32`] or [`Want::Hex32`] option; zero for any other kind.
    pub fn u32(self) -> u32 {
        match self {
            Self::U32(value) => value,
            _ => 0,
        }
    }

    /// The switch of a [`Want::OnOff`] option.
    pub fn bool(self) -> bool {
        self == Self::Bool(true)
    }
}

/// One row of a command's option table. `names` are long spellings without dashes, the preferred one first.
#[derive(Clone, Copy, Debug)]
pub struct Opt<K: 'static> {
    pub names: &'static [&'static str],
    pub short: Option<char>,
    pub want: Want,
    pub indexed: bool,
    pub key: K,
}

/// A row without a short form and without an index.
pub const fn opt<K>(names: &'static [&'static str], want: Want, key: K) -> Opt<K> {
    Opt { names, short: None, want, indexed: false, key }
}

/// A row with a one-letter form.
pub const fn short<K>(names: &'static [&'static str], letter: char, want: Want, key: K) -> Opt<K> {
    Opt { names, short: Some(letter), want, indexed: false, key }
}

/// What the parser came upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item<K> {
    Opt { key: K, name: String, index: Option<u32>, value: Value },
    Word(String),
}

/// Why a command line does not parse. The texts are `VBoxManage`'s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetOptError {
    /// `--help`, `-h` or `-?` where the command has no such option of its own.
    HelpWanted,
    Unknown(String),
    BadFormat(String),
    ValueMissing(String),
    IndexMissing(String),
}

impl fmt::Display for GetOptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HelpWanted => f.write_str("help wanted"),
            Self::Unknown(text) => write!(f, "Unknown option: {text}"),
            Self::BadFormat(text) => write!(f, "Invalid argument format: {text}"),
            Self::ValueMissing(name) => write!(f, "{name}: Command line option needs argument."),
            Self::IndexMissing(name) => write!(f, "{name}: Command line option needs an index."),
        }
    }
}

/// Walks over a command's words.
pub struct Parser<'a, K: 'static> {
    words: &'a [String],
    next: usize,
    table: &'a [Opt<K>],
    /// Rest of a bundle of short options.
    bundle: String,
    only_words: bool,
}

impl<'a, K: Copy + 'static> Parser<'a, K> {
    pub fn new(words: &'a [String], table: &'a [Opt<K>]) -> Self {
        Self { words, next: 0, table, bundle: String::new(), only_words: false }
    }

    /// The next option or word; `None` at the end.
    pub fn item(&mut self) -> Result<Option<Item<K>>, GetOptError> {
        if !self.bundle.is_empty() {
            let bundle = std::mem::take(&mut self.bundle);
            return self.short_option(&bundle).map(Some);
        }
        let Some(word) = self.words.get(self.next) else { return Ok(None) };
        self.next += 1;
        if self.only_words || !word.starts_with('-') || word == "-" {
            return Ok(Some(Item::Word(word.clone())));
        }
        if let Some(item) = self.long_option(word)? {
            return Ok(Some(item));
        }
        if word == "--" {
            self.only_words = true;
            return self.item();
        }
        if !word.starts_with("--") && self.find_short(word.chars().nth(1)).is_some() {
            return self.short_option(&word[1..]).map(Some);
        }
        if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?") {
            return Err(GetOptError::HelpWanted);
        }
        Err(GetOptError::Unknown(word.clone()))
    }

    /// The following word, as a further value of the option `name` just returned.
    pub fn fetch(&mut self, name: &str, want: Want) -> Result<Value, GetOptError> {
        let Some(word) = self.words.get(self.next) else {
            return Err(GetOptError::ValueMissing(name.to_owned()));
        };
        self.next += 1;
        convert(want, word)
    }

    fn find_short(&self, letter: Option<char>) -> Option<&'a Opt<K>> {
        letter.and_then(|letter| self.table.iter().find(|row| row.short == Some(letter)))
    }

    fn long_option(&mut self, word: &str) -> Result<Option<Item<K>>, GetOptError> {
        let bare = word.strip_prefix("--").unwrap_or(&word[1..]);
        let Some((row, name)) = find_long(self.table, bare) else { return Ok(None) };
        let shown = format!("--{name}");
        let mut rest = &bare[name.len()..];
        let mut index = None;
        if row.indexed {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            if digits == 0 {
                return Err(GetOptError::IndexMissing(shown));
            }
            index = Some(rest[..digits].parse().map_err(|_| GetOptError::BadFormat(word.to_owned()))?);
            rest = &rest[digits..];
        }
        let value = if row.want == Want::Nothing {
            Value::Nothing
        } else if rest.is_empty() {
            self.fetch(&shown, row.want)?
        } else {
            convert(row.want, &rest[1..])?
        };
        Ok(Some(Item::Opt { key: row.key, name: shown, index, value }))
    }

    /// `bundle` is a run of short options without its dash; the first letter is known to exist only for the
    /// first one of the run.
    fn short_option(&mut self, bundle: &str) -> Result<Item<K>, GetOptError> {
        let letter = bundle.chars().next();
        let Some(row) = self.find_short(letter) else {
            return Err(GetOptError::Unknown(format!("-{bundle}")));
        };
        let rest = &bundle[letter.map_or(0, char::len_utf8)..];
        let name = format!("--{}", row.names.first().copied().unwrap_or_default());
        let (key, want) = (row.key, row.want);
        let value = if want == Want::Nothing {
            self.bundle = rest.to_owned();
            Value::Nothing
        } else if rest.is_empty() {
            self.fetch(&name, want)?
        } else {
            convert(want, rest.strip_prefix([':', '=']).unwrap_or(rest))?
        };
        Ok(Item::Opt { key, name, index: None, value })
    }
}

/// The row whose name starts `bare`, with only an index and a value after it.
fn find_long<'a, K>(table: &'a [Opt<K>], bare: &str) -> Option<(&'a Opt<K>, &'static str)> {
    table.iter().find_map(|row| {
        let name = row.names.iter().copied().find(|name| {
            let Some(rest) = bare.strip_prefix(name) else { return false };
            let rest = if row.indexed { rest.trim_start_matches(|c: char| c.is_ascii_digit()) } else { rest };
            rest.is_empty() || (row.want != Want::Nothing && rest.starts_with([':', '=']))
        })?;
        Some((row, name))
    })
}

/// Converts one word; the error names the word.
fn convert(want: Want, word: &str) -> Result<Value, GetOptError> {
    let bad = || GetOptError::BadFormat(word.to_owned());
    Ok(match want {
        Want::Nothing => Value::Nothing,
        Want::Text => Value::Text(word.to_owned()),
        Want::OnOff => match on_off(word) {
            Some(value) => Value::Bool(value),
            // VirtualBox reports a bad switch value as an unknown option.
            None => return Err(GetOptError::Unknown(word.to_owned())),
        },
        Want::U32 => Value::U32(unsigned(word).and_then(|v| v.try_into().ok()).ok_or_else(bad)?),
        Want::U64 => Value::U64(unsigned(word).ok_or_else(bad)?),
        Want::I32 => Value::I32(signed(word).and_then(|v| v.try_into().ok()).ok_or_else(bad)?),
        Want::I64 => Value::I64(signed(word).ok_or_else(bad)?),
        Want::Hex32 => Value::U32(hex32(word).ok_or_else(bad)?),
        Want::HexPair => {
            let (first, second) = match word.split_once([':', '/', '|']) {
                Some((first, second)) => (first, Some(second)),
                None => (word, None),
            };
            let second = match second {
                Some(second) => hex32(second.trim()).ok_or_else(bad)?,
                None => u32::MAX,
            };
            Value::Pair(hex32(first.trim()).ok_or_else(bad)?, second)
        }
        Want::Uuid => Value::Uuid(parse_uuid(word).ok_or_else(bad)?),
    })
}

/// `on` or `off`, in any case.
pub fn on_off(word: &str) -> Option<bool> {
    if word.eq_ignore_ascii_case("on") {
        Some(true)
    } else if word.eq_ignore_ascii_case("off") {
        Some(false)
    } else {
        None
    }
}

/// Decimal, or hexadecimal with `0x`. Leading zeros do not mean octal.
pub fn unsigned(word: &str) -> Option<u64> {
    match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(hex) if hex.starts_with(|c: char| c.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if word.starts_with('+') => None,
        None => word.parse().ok(),
    }
}

fn signed(word: &str) -> Option<i64> {
    match word.strip_prefix('-') {
        Some(magnitude) => i64::try_from(-i128::from(unsigned(magnitude)?)).ok(),
        None => unsigned(word)?.try_into().ok(),
    }
}

fn hex32(word: &str) -> Option<u32> {
    let digits = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")).unwrap_or(word);
    if digits.starts_with('+') { None } else { u32::from_str_radix(digits, 16).ok() }
}

/// A UUID in the plain or the braced form.
pub fn parse_uuid(word: &str) -> Option<uuid::Uuid> {
    let bare = word.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or(word);
    if bare.len() == 36 { uuid::Uuid::try_parse(bare).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Key {
        Name,
        Long,
        Sorted,
        Port,
        Nic,
        NicType,
        On,
        Leaf,
    }

    const TABLE: &[Opt<Key>] = &[
        opt(&["name"], Want::Text, Key::Name),
        short(&["long"], 'l', Want::Nothing, Key::Long),
        short(&["sorted"], 's', Want::Nothing, Key::Sorted),
        short(&["port"], 'p', Want::U32, Key::Port),
        Opt { names: &["nic"], short: None, want: Want::Text, indexed: true, key: Key::Nic },
        Opt {
            names: &["nic-type", "nictype"],
            short: None,
            want: Want::Text,
            indexed: true,
            key: Key::NicType,
        },
        opt(&["on"], Want::OnOff, Key::On),
        opt(&["leaf"], Want::HexPair, Key::Leaf),
    ];

    fn all(line: &str) -> Result<Vec<Item<Key>>, GetOptError> {
        let words: Vec<String> = line.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect();
        let mut parser = Parser::new(&words, TABLE);
        let mut items = Vec::new();
        while let Some(item) = parser.item()? {
            items.push(item);
        }
        Ok(items)
    }

    fn found(key: Key, name: &str, index: Option<u32>, value: Value) -> Item<Key> {
        Item::Opt { key, name: name.to_owned(), index, value }
    }

    #[test]
    fn a_value_may_follow_after_a_space_an_equals_sign_or_a_colon() {
        for line in ["--name x", "--name=x", "--name:x", "-name x", "-name=x"] {
            let expected = vec![found(Key::Name, "--name", None, Value::Text("x".into()))];
            assert_eq!(all(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn an_index_stands_between_name_and_value() {
        for line in ["--nic-type3 virtio", "--nictype3 virtio", "--nictype3=virtio", "--nic-type3:virtio"] {
            let items = all(line).unwrap();
            let Item::Opt { key, index, value, .. } = items[0].clone() else { panic!("{line}") };
            assert_eq!((key, index, value), (Key::NicType, Some(3), Value::Text("virtio".into())), "{line}");
        }
        assert_eq!(all("--nic nat"), Err(GetOptError::IndexMissing("--nic".into())));
    }

    #[test]
    fn words_and_options_may_come_in_any_order() {
        let items = all("vms -l --port 7 more").unwrap();
        assert_eq!(items[0], Item::Word("vms".into()));
        assert_eq!(items[1], found(Key::Long, "--long", None, Value::Nothing));
        assert_eq!(items[2], found(Key::Port, "--port", None, Value::U32(7)));
        assert_eq!(items[3], Item::Word("more".into()));
    }

    #[test]
    fn short_options_bundle_and_take_attached_values() {
        assert_eq!(all("-ls").unwrap().len(), 2);
        for line in ["-p7", "-p=7", "-p:7", "-p 7", "-p 0x7"] {
            assert_eq!(all(line).unwrap(), vec![found(Key::Port, "--port", None, Value::U32(7))], "{line}");
        }
        assert_eq!(all("-lx"), Err(GetOptError::Unknown("-x".into())));
    }

    #[test]
    fn a_double_dash_ends_the_options() {
        assert_eq!(all("-- --name").unwrap(), vec![Item::Word("--name".into())]);
    }

    #[test]
    fn errors_name_what_was_wrong() {
        assert_eq!(all("--nope").unwrap_err().to_string(), "Unknown option: --nope");
        assert_eq!(all("--on maybe").unwrap_err().to_string(), "Unknown option: maybe");
        assert_eq!(all("--port x").unwrap_err().to_string(), "Invalid argument format: x");
        assert_eq!(all("--port").unwrap_err().to_string(), "--port: Command line option needs argument.");
        assert_eq!(all("--help").unwrap_err(), GetOptError::HelpWanted);
    }

    #[test]
    fn numbers_follow_iprt() {
        assert_eq!(unsigned("010"), Some(10), "no octal");
        assert_eq!(unsigned("0x10"), Some(16));
        assert_eq!(unsigned("-1"), None);
        assert_eq!(signed("-86400000"), Some(-86_400_000));
        assert_eq!(convert(Want::U32, "4294967296"), Err(GetOptError::BadFormat("4294967296".into())));
        assert_eq!(convert(Want::HexPair, "80000001:2"), Ok(Value::Pair(0x8000_0001, 2)));
        assert_eq!(convert(Want::HexPair, "1"), Ok(Value::Pair(1, u32::MAX)));
    }
}
