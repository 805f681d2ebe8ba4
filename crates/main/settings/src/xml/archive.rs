//! One description for both directions: a function that walks an [`Archive`] names each attribute and child once,
//! with its default, and thereby says how it is read and how it is written.
//!
//! Reading gives every field a value: the file's, or the default named beside it. Writing leaves out what is at
//! its default, as VirtualBox does, and creates attributes and children in the order of the walk.

use uuid::Uuid;

use super::dom::{Element, Node};
use crate::error::ContentError;
use crate::model::Timestamp;
use crate::words::Word;

/// What stands in a file as one attribute.
pub(crate) trait Value: Sized {
    /// The value that `text` stands for.
    fn from_text(text: &str) -> Option<Self>;
    /// The text that VirtualBox writes.
    fn to_text(&self) -> String;
    /// What to write instead of a text that stands for nothing.
    fn mend() -> String;
}

impl Value for String {
    fn from_text(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }

    fn to_text(&self) -> String {
        self.clone()
    }

    fn mend() -> String {
        "write some text".into()
    }
}

impl Value for bool {
    fn from_text(text: &str) -> Option<Self> {
        match text {
            "true" | "yes" | "1" => Some(true),
            "false" | "no" | "0" => Some(false),
            _ => None,
        }
    }

    fn to_text(&self) -> String {
        self.to_string()
    }

    fn mend() -> String {
        "write \"true\" or \"false\"".into()
    }
}

/// Digits of a number with C's prefixes for hexadecimal and octal, which is how VirtualBox reads them.
fn radix(digits: &str) -> (&str, u32) {
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(rest) => (rest, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    }
}

macro_rules! integers {
    ($($integer:ty),*) => {$(
        impl Value for $integer {
            fn from_text(text: &str) -> Option<Self> {
                let text = text.trim();
                let (negative, digits) = match text.strip_prefix('-') {
                    Some(rest) => (true, rest),
                    None => (false, text),
                };
                let (digits, radix) = radix(digits);
                if !digits.starts_with(|c: char| c.is_digit(radix)) {
                    return None;
                }
                let size = i128::from_str_radix(digits, radix).ok()?;
                Self::try_from(if negative { -size } else { size }).ok()
            }

            fn to_text(&self) -> String {
                self.to_string()
            }

            fn mend() -> String {
                format!("write a whole number from {} to {}", Self::MIN, Self::MAX)
            }
        }
    )*};
}

integers!(u16, u32, u64, i32, i64);

impl Value for Uuid {
    fn from_text(text: &str) -> Option<Self> {
        Uuid::try_parse(text).ok().filter(|uuid| !uuid.is_nil())
    }

    fn to_text(&self) -> String {
        self.braced().to_string()
    }

    fn mend() -> String {
        "write a UUID of the form {8f9dcf34-3b10-44e6-9bbc-5d8ff4a6d7b1}".into()
    }
}

impl Value for Timestamp {
    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn to_text(&self) -> String {
        self.to_string()
    }

    fn mend() -> String {
        "write a time of the form 2009-07-10T11:54:03Z".into()
    }
}

impl<T: Word> Value for T {
    fn from_text(text: &str) -> Option<Self> {
        T::from_word(text)
    }

    fn to_text(&self) -> String {
        (*self).as_str().to_owned()
    }

    fn mend() -> String {
        let words: Vec<_> = T::ALL.iter().map(|value| value.as_str()).collect();
        format!("write one of {}", words.join(", "))
    }
}

/// A number that is written in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hex(pub u32);

impl Value for Hex {
    fn from_text(text: &str) -> Option<Self> {
        u32::from_text(text).map(Self)
    }

    fn to_text(&self) -> String {
        format!("0x{:x}", self.0)
    }

    fn mend() -> String {
        "write a number such as 0x3f8".into()
    }
}

pub(crate) type Outcome = Result<(), ContentError>;

/// An element being read, or being written.
pub(crate) enum Archive<'a> {
    Read(&'a Element),
    Write(&'a mut Element),
}

/// What a missing element is read as: nothing but defaults.
static MISSING: Element = Element::EMPTY;

impl Archive<'_> {
    /// Whether the element is being read.
    pub(crate) fn reading(&self) -> bool {
        matches!(self, Self::Read(_))
    }

    fn name(&self) -> &str {
        match self {
            Self::Read(element) => element.name(),
            Self::Write(element) => element.name(),
        }
    }

    /// An error at this element.
    pub(crate) fn error(&self, what: impl Into<String>, mend: impl Into<String>) -> ContentError {
        let (line, column) = match self {
            Self::Read(element) => element.position(),
            Self::Write(_) => (0, 0),
        };
        ContentError::new(line, column, what, mend)
    }

    /// Whether the element being read has a child `name`.
    pub(crate) fn has_child(&self, name: &str) -> bool {
        matches!(self, Self::Read(element) if element.element(name).is_some())
    }

    /// Reads the attribute `name`, if it is there.
    pub(crate) fn read<T: Value>(&self, name: &str) -> Result<Option<T>, ContentError> {
        let Self::Read(element) = self else { return Ok(None) };
        match element.attribute(name) {
            None => Ok(None),
            Some(text) => match T::from_text(&text) {
                Some(value) => Ok(Some(value)),
                None => Err(self.error(
                    format!("Invalid value '{}' in {}/@{name} attribute", shorten(&text), self.name()),
                    T::mend(),
                )),
            },
        }
    }

    /// Writes the attribute `name`.
    pub(crate) fn write<T: Value>(&mut self, name: &str, value: &T) {
        if let Self::Write(element) = self {
            element.set_attribute(name, &value.to_text());
        }
    }

    /// An attribute that is left out at its default.
    pub(crate) fn attribute<T: Value + PartialEq>(
        &mut self,
        name: &str,
        field: &mut T,
        default: T,
    ) -> Outcome {
        let write = *field != default;
        self.attribute_if(write, name, field, default)
    }

    /// An attribute that is written if `write`, and means `default` where it is missing.
    pub(crate) fn attribute_if<T: Value>(
        &mut self,
        write: bool,
        name: &str,
        field: &mut T,
        default: T,
    ) -> Outcome {
        if self.reading() {
            *field = self.read(name)?.unwrap_or(default);
        } else if write {
            self.write(name, field);
        }
        Ok(())
    }

    /// An attribute that is always written, and means `default` where it is missing.
    pub(crate) fn always<T: Value>(&mut self, name: &str, field: &mut T, default: T) -> Outcome {
        self.attribute_if(true, name, field, default)
    }

    /// An always written attribute whose file form is the number of a word in its enumeration.
    pub(crate) fn numbered<T: Word>(&mut self, name: &str, field: &mut T, default: T) -> Outcome {
        if self.reading() {
            let Some(number) = self.read::<u32>(name)? else {
                *field = default;
                return Ok(());
            };
            *field = *T::ALL.get(number as usize).ok_or_else(|| {
                let words: Vec<_> =
                    T::ALL.iter().enumerate().map(|(n, word)| format!("{n} ({})", word.as_str())).collect();
                self.error(
                    format!("Invalid value '{number}' in {}/@{name} attribute", self.name()),
                    format!("write one of {}", words.join(", ")),
                )
            })?;
        } else {
            let number = T::ALL.iter().position(|value| value == field).unwrap_or_default();
            self.write(name, &(number as u64));
        }
        Ok(())
    }

    /// An always written truth value in digits; it must be there.
    pub(crate) fn digit(&mut self, name: &str, field: &mut bool) -> Outcome {
        if self.reading() {
            self.required(name, field)
        } else {
            self.write(name, &u32::from(*field));
            Ok(())
        }
    }

    /// An attribute that must be there.
    pub(crate) fn required<T: Value>(&mut self, name: &str, field: &mut T) -> Outcome {
        if self.reading() {
            *field = self.read(name)?.ok_or_else(|| {
                self.error(format!("Required {}/@{name} attribute is missing", self.name()), T::mend())
            })?;
        } else {
            self.write(name, field);
        }
        Ok(())
    }

    /// An attribute that may be absent altogether.
    pub(crate) fn optional<T: Value>(&mut self, name: &str, field: &mut Option<T>) -> Outcome {
        if self.reading() {
            *field = self.read(name)?;
        } else if let Some(value) = field {
            self.write(name, value);
        }
        Ok(())
    }

    /// A child that is left out if nothing is written into it.
    pub(crate) fn child(&mut self, name: &str, walk: impl FnOnce(&mut Archive<'_>) -> Outcome) -> Outcome {
        self.child_if(false, name, walk)
    }

    /// A child that is written if `always` or if anything is written into it.
    pub(crate) fn child_if(
        &mut self,
        always: bool,
        name: &str,
        walk: impl FnOnce(&mut Archive<'_>) -> Outcome,
    ) -> Outcome {
        match self {
            Self::Read(element) => walk(&mut Archive::Read(element.element(name).unwrap_or(&MISSING))),
            Self::Write(element) => {
                let mut child = Element::new(name);
                walk(&mut Archive::Write(&mut child))?;
                if always || !child.attributes().is_empty() || !child.children().is_empty() {
                    element.push(Node::Element(child));
                }
                Ok(())
            }
        }
    }

    /// A child whose presence means something: read only if it is there, written if `present`.
    pub(crate) fn presence(
        &mut self,
        name: &str,
        present: bool,
        walk: impl FnOnce(&mut Archive<'_>) -> Outcome,
    ) -> Outcome {
        if self.has_child(name) || (!self.reading() && present) {
            self.child_if(true, name, walk)
        } else {
            Ok(())
        }
    }

    /// A child with the one attribute `enabled`, left out at its default.
    pub(crate) fn flag(&mut self, name: &str, field: &mut bool, default: bool) -> Outcome {
        self.child(name, |a| a.attribute("enabled", field, default))
    }

    /// A child with the one attribute `enabled`, always written.
    pub(crate) fn flag_always(&mut self, name: &str, field: &mut bool, default: bool) -> Outcome {
        self.child(name, |a| a.always("enabled", field, default))
    }

    /// A child that holds text, left out if the text is empty.
    pub(crate) fn text_child(&mut self, name: &str, field: &mut String) -> Outcome {
        match self {
            Self::Read(element) => *field = element.element(name).map(Element::text).unwrap_or_default(),
            Self::Write(element) => {
                if !field.is_empty() {
                    let mut child = Element::new(name);
                    child.set_text(field);
                    element.push(Node::Element(child));
                }
            }
        }
        Ok(())
    }

    /// All children called `name`, one for each item.
    pub(crate) fn list<T: Default>(
        &mut self,
        name: &str,
        items: &mut Vec<T>,
        mut walk: impl FnMut(&mut Archive<'_>, &mut T) -> Outcome,
    ) -> Outcome {
        match self {
            Self::Read(element) => {
                items.clear();
                for child in element.elements().filter(|e| e.name() == name) {
                    let mut item = T::default();
                    walk(&mut Archive::Read(child), &mut item)?;
                    items.push(item);
                }
            }
            Self::Write(element) => {
                for item in items {
                    let mut child = Element::new(name);
                    walk(&mut Archive::Write(&mut child), item)?;
                    element.push(Node::Element(child));
                }
            }
        }
        Ok(())
    }
}

/// At most a line's worth of a value that came from a file.
fn shorten(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::Chipset;

    #[test]
    fn numbers_are_read_as_c_reads_them() {
        assert_eq!(u32::from_text("0x3F8"), Some(0x3f8));
        assert_eq!(u32::from_text("010"), Some(8));
        assert_eq!(u32::from_text("0"), Some(0));
        assert_eq!(i32::from_text("-5"), Some(-5));
        assert_eq!(i64::from_text("-9223372036854775808"), Some(i64::MIN));
        for text in ["", "-", "+1", "0x", "12a", "4294967296", "--1", "0x-1", "1 2"] {
            assert_eq!(u32::from_text(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_wrong_value_is_named_with_its_place_and_the_right_ones() {
        let document =
            super::super::Document::parse(b"<Hardware>\n  <Chipset type=\"Q35\"/></Hardware>").unwrap();
        let mut chipset = Chipset::default();
        let error = Archive::Read(document.root())
            .child("Chipset", |a| a.attribute("type", &mut chipset, Chipset::Piix3))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "(line 2, column 3) -- Invalid value 'Q35' in Chipset/@type attribute; write one of PIIX3, ICH9"
        );
    }
}
