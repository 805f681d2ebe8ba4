//! The document tree. Whatever was read is kept as it stood: white space, order, quotes, comments, unknown
//! elements, character references. Only what is set later is written afresh, the way VirtualBox's writer does.
//!
//! `quick-xml` splits the text into markup and checks that it nests; the spelling inside tags is split here,
//! because it must survive. Document types and external entities are refused.

use std::borrow::Cow;

use quick_xml::Reader;
use quick_xml::escape::{resolve_xml_entity, unescape_with};
use quick_xml::events::Event;

use crate::error::ContentError;

/// Longest settings file that is read, in bytes.
pub const MAX_SIZE: u64 = 64 << 20;

/// Deepest nesting of elements that is read. VirtualBox allows 250 snapshots below each other, which
/// take two elements each.
pub const MAX_DEPTH: usize = 1024;

/// Most attributes that an element may have.
const MAX_ATTRIBUTES: usize = 256;

/// A whole file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    byte_order_mark: bool,
    before: Vec<Node>,
    root: Element,
    after: Vec<Node>,
}

/// A piece of a document or of an element's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Element(Element),
    /// Character data as written, references and all.
    Text(String),
    /// Anything else, with its delimiters: comments, CDATA, processing instructions, the XML declaration.
    Verbatim(String),
}

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    pub(super) name: String,
    pub(super) attributes: Vec<Attribute>,
    pub(super) children: Vec<Node>,
    /// White space before `>` or `/>`.
    tag_end: String,
    /// Written as `<Name/>`; only without children.
    pub(super) empty_tag: bool,
    /// What stands between `</` and `>` after the name.
    close_space: String,
    line: u32,
    column: u32,
}

/// An attribute as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// White space before the name.
    space: String,
    name: String,
    /// The equals sign with the white space around it.
    equals: String,
    quote: char,
    /// The value with its references.
    raw: String,
}

impl Attribute {
    fn new(name: &str, value: &str) -> Self {
        Self {
            space: " ".into(),
            name: name.into(),
            equals: "=".into(),
            quote: '"',
            raw: escape_attribute(value),
        }
    }

    /// The attribute's name, with its prefix.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value, with references resolved and white space normalized as XML wants it.
    pub fn value(&self) -> Cow<'_, str> {
        if !self.raw.contains(['&', '\n', '\r', '\t']) {
            return Cow::Borrowed(&self.raw);
        }
        let spaced = self.raw.replace("\r\n", " ").replace(['\n', '\r', '\t'], " ");
        match unescape_with(&spaced, resolve_xml_entity) {
            Ok(value) => Cow::Owned(value.into_owned()),
            // References were checked when the document was parsed.
            Err(_) => Cow::Owned(spaced),
        }
    }
}

impl Element {
    /// An element without name or content.
    pub(super) const EMPTY: Self = Self {
        name: String::new(),
        attributes: Vec::new(),
        children: Vec::new(),
        tag_end: String::new(),
        empty_tag: true,
        close_space: String::new(),
        line: 0,
        column: 0,
    };

    /// A new element without content.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), empty_tag: true, ..Self::default() }
    }

    /// The element's name, with its prefix.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Line and column of the start tag, counted from 1; zeros if it was not read from a file.
    pub fn position(&self) -> (u32, u32) {
        (self.line, self.column)
    }

    /// All attributes in order.
    pub fn attributes(&self) -> &[Attribute] {
        &self.attributes
    }

    /// All content in order.
    pub fn children(&self) -> &[Node] {
        &self.children
    }

    /// The value of the attribute `name`.
    pub fn attribute(&self, name: &str) -> Option<Cow<'_, str>> {
        self.attributes.iter().find(|a| a.name == name).map(Attribute::value)
    }

    /// The elements directly below this one.
    pub fn elements(&self) -> impl DoubleEndedIterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// The first element directly below this one that is called `name`.
    pub fn element(&self, name: &str) -> Option<&Element> {
        self.elements().find(|e| e.name == name)
    }

    /// The first element directly below this one that is called `name`.
    pub fn element_mut(&mut self, name: &str) -> Option<&mut Element> {
        self.children.iter_mut().find_map(|node| match node {
            Node::Element(element) if element.name == name => Some(element),
            _ => None,
        })
    }

    /// The character data directly below this element.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for node in &self.children {
            match node {
                Node::Text(raw) => {
                    let raw = raw.replace("\r\n", "\n").replace('\r', "\n");
                    match unescape_with(&raw, resolve_xml_entity) {
                        Ok(value) => text.push_str(&value),
                        Err(_) => text.push_str(&raw),
                    }
                }
                Node::Verbatim(raw) => {
                    if let Some(data) = raw.strip_prefix("<![CDATA[").and_then(|r| r.strip_suffix("]]>")) {
                        text.push_str(&data.replace("\r\n", "\n"));
                    }
                }
                Node::Element(_) => {}
            }
        }
        text
    }

    /// Sets the attribute `name`, in its place if it is there, else at the end.
    pub fn set_attribute(&mut self, name: &str, value: &str) {
        self.set_attribute_at(self.attributes.len(), name, value);
    }

    /// Sets the attribute `name`; a new one goes to `index` among the attributes.
    pub(super) fn set_attribute_at(&mut self, index: usize, name: &str, value: &str) {
        match self.attributes.iter_mut().find(|a| a.name == name) {
            Some(attribute) if attribute.value() == value => {}
            Some(attribute) => {
                attribute.raw = escape_attribute(value);
                attribute.quote = '"';
            }
            None => self.attributes.insert(index, Attribute::new(name, value)),
        }
    }

    /// Removes the attribute `name`.
    pub fn remove_attribute(&mut self, name: &str) {
        self.attributes.retain(|a| a.name != name);
    }

    /// Adds content at the end.
    pub fn push(&mut self, node: Node) {
        self.empty_tag = false;
        self.children.push(node);
    }

    /// The element as text.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    /// Replaces all content by character data.
    pub fn set_text(&mut self, text: &str) {
        self.children.clear();
        self.empty_tag = text.is_empty();
        if !text.is_empty() {
            self.children.push(Node::Text(escape_text(text)));
        }
    }

    /// The elements directly below this one.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        self.children.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// Takes out the first element called `name`, with the white space before it.
    pub(crate) fn take_element(&mut self, name: &str) -> Option<Element> {
        let at = self.children.iter().position(|node| matches!(node, Node::Element(e) if e.name == name))?;
        let node = self.children.remove(at);
        if let Some(before) = at.checked_sub(1) {
            if matches!(&self.children[before], Node::Text(text) if text.trim().is_empty()) {
                self.children.remove(before);
            }
        }
        match node {
            Node::Element(element) => Some(element),
            _ => None,
        }
    }

    /// Adds an element at the end, on a line of its own if the others have theirs.
    pub(crate) fn append_laid_out(&mut self, element: Element) {
        self.empty_tag = false;
        let first = self.children.first().cloned();
        let at = match self.children.last() {
            Some(Node::Text(text)) if text.trim().is_empty() => self.children.len() - 1,
            _ => self.children.len(),
        };
        self.children.insert(at, Node::Element(element));
        if let Some(space @ Node::Text(_)) = first {
            self.children.insert(at, space);
        }
    }

    /// Indents everything in the element, but not the element itself, by one level more.
    pub(crate) fn shift_right(&mut self) {
        for child in &mut self.children {
            match child {
                Node::Text(text) if text.trim().is_empty() => *text = text.replace('\n', "\n  "),
                Node::Element(element) => element.shift_right(),
                _ => {}
            }
        }
    }

    /// The white space between the last line break and the element `name` directly below this one.
    pub(crate) fn child_indent(&self, name: &str) -> String {
        let mut indent = String::new();
        for node in &self.children {
            match node {
                Node::Text(text) => {
                    indent = text.rsplit_once('\n').map_or(String::new(), |(_, space)| space.to_owned())
                }
                Node::Element(element) if element.name == name => break,
                _ => indent.clear(),
            }
        }
        if indent.trim().is_empty() { indent } else { String::new() }
    }

    fn write(&self, out: &mut String) {
        out.push('<');
        out.push_str(&self.name);
        for attribute in &self.attributes {
            out.push_str(&attribute.space);
            out.push_str(&attribute.name);
            out.push_str(&attribute.equals);
            out.push(attribute.quote);
            out.push_str(&attribute.raw);
            out.push(attribute.quote);
        }
        out.push_str(&self.tag_end);
        if self.empty_tag && self.children.is_empty() {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for child in &self.children {
            child.write(out);
        }
        out.push_str("</");
        out.push_str(&self.name);
        out.push_str(&self.close_space);
        out.push('>');
    }

    /// Lays the element's content out as VirtualBox does: one element a line, two spaces a level. For
    /// elements that were made here, and therefore hold no white space of their own.
    pub(crate) fn indent(&mut self, line_break: &str, level_indent: &str) {
        let has_elements = self.children.iter().any(|node| !matches!(node, Node::Text(_)));
        if !has_elements {
            return;
        }
        let inner = format!("{level_indent}  ");
        let mut laid_out = Vec::with_capacity(self.children.len() * 2 + 1);
        for mut node in self.children.drain(..) {
            laid_out.push(Node::Text(format!("{line_break}{inner}")));
            if let Node::Element(element) = &mut node {
                element.indent(line_break, &inner);
            }
            laid_out.push(node);
        }
        laid_out.push(Node::Text(format!("{line_break}{level_indent}")));
        self.children = laid_out;
        self.empty_tag = false;
    }

    /// Fails if a value holds a character that XML cannot express.
    pub(crate) fn check_expressible(&self) -> Result<(), ContentError> {
        for attribute in &self.attributes {
            if let Some(bad) = attribute.raw.chars().find(|&c| !is_xml_char(c)) {
                return Err(inexpressible(&format!("{}/@{}", self.name, attribute.name), bad));
            }
        }
        for child in &self.children {
            match child {
                Node::Element(element) => element.check_expressible()?,
                Node::Text(text) | Node::Verbatim(text) => {
                    if let Some(bad) = text.chars().find(|&c| !is_xml_char(c)) {
                        return Err(inexpressible(&self.name, bad));
                    }
                }
            }
        }
        Ok(())
    }
}

fn inexpressible(place: &str, bad: char) -> ContentError {
    ContentError::new(
        0,
        0,
        format!("{place} would hold the character U+{:04X}, which XML cannot express", u32::from(bad)),
        "choose a value without it",
    )
}

impl Node {
    fn write(&self, out: &mut String) {
        match self {
            Self::Element(element) => element.write(out),
            Self::Text(raw) | Self::Verbatim(raw) => out.push_str(raw),
        }
    }
}

impl Document {
    /// A new document with the comment that VirtualBox's files have above their root.
    pub fn new(root: Element) -> Self {
        let warning = "<!--\n\
            ** This file belongs to VirtualBox: do not edit it by hand.\n\
            ** Changes made here while a VirtualBox program runs are lost when that program saves.\n\
            ** Use VBoxManage or the VirtualBox Manager instead.\n\
            -->";
        Self {
            byte_order_mark: false,
            before: vec![
                Node::Verbatim("<?xml version=\"1.0\"?>".into()),
                Node::Text("\n".into()),
                Node::Verbatim(warning.into()),
                Node::Text("\n".into()),
            ],
            root,
            after: vec![Node::Text("\n".into())],
        }
    }

    /// The outermost element.
    pub fn root(&self) -> &Element {
        &self.root
    }

    /// The outermost element.
    pub fn root_mut(&mut self) -> &mut Element {
        &mut self.root
    }

    /// The text of the document; for one that was parsed and not changed, the text it was parsed from.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        if self.byte_order_mark {
            out.push('\u{feff}');
        }
        for node in self.before.iter() {
            node.write(&mut out);
        }
        self.root.write(&mut out);
        for node in self.after.iter() {
            node.write(&mut out);
        }
        out
    }

    /// The line break that the document uses.
    pub(crate) fn line_break(&self) -> &'static str {
        fn first(node: &Node) -> Option<&str> {
            match node {
                Node::Text(raw) | Node::Verbatim(raw) => raw.contains('\n').then_some(raw),
                Node::Element(element) => element.children.iter().find_map(first),
            }
        }
        let text = self.before.iter().chain(&self.root.children).find_map(first);
        if text.is_some_and(|text| text.contains("\r\n")) { "\r\n" } else { "\n" }
    }

    /// Parses the bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ContentError> {
        if bytes.len() as u64 > MAX_SIZE {
            return Err(ContentError::new(
                1,
                1,
                format!("{} bytes are more than the {MAX_SIZE} that are read", bytes.len()),
                "this is not a settings file",
            ));
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let good = std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default();
            let mut position = Position::default();
            position.advance(good);
            position.error(
                format!("the byte 0x{:02x} is not UTF-8", bytes[error.valid_up_to()]),
                "save the file as UTF-8",
            )
        })?;
        let (byte_order_mark, text) = match text.strip_prefix('\u{feff}') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut document = Parser::new(text).run()?;
        document.byte_order_mark = byte_order_mark;
        Ok(document)
    }
}

/// Line and column in the text, counted up from the start.
#[derive(Clone, Copy, Debug)]
struct Position {
    line: u32,
    column: u32,
}

impl Default for Position {
    fn default() -> Self {
        Self { line: 1, column: 1 }
    }
}

impl Position {
    fn advance(&mut self, text: &str) {
        for c in text.chars() {
            if c == '\n' {
                self.line = self.line.saturating_add(1);
                self.column = 1;
            } else {
                self.column = self.column.saturating_add(1);
            }
        }
    }

    fn error(self, what: impl Into<String>, mend: impl Into<String>) -> ContentError {
        ContentError::new(self.line, self.column, what, mend)
    }
}

struct Parser<'a> {
    text: &'a str,
    /// Where the markup being looked at begins.
    position: Position,
    open: Vec<Element>,
    before: Vec<Node>,
    root: Option<Element>,
    after: Vec<Node>,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            position: Position::default(),
            open: Vec::new(),
            before: Vec::new(),
            root: None,
            after: Vec::new(),
        }
    }

    fn run(mut self) -> Result<Document, ContentError> {
        const EDITED: &str = "restore the file from a copy, or correct it with an XML editor";
        let text = self.text;
        let mut reader = Reader::from_str(text);
        let mut start = 0;
        loop {
            let event = reader.read_event();
            let end = match &event {
                Ok(_) => usize::try_from(reader.buffer_position()).unwrap_or(text.len()),
                Err(_) => usize::try_from(reader.error_position()).unwrap_or(text.len()).max(start),
            };
            let raw = text.get(start..end.min(text.len())).unwrap_or_default();
            match event {
                Err(error) => {
                    self.position.advance(raw);
                    return Err(self.position.error(format!("not well-formed XML: {error}"), EDITED));
                }
                Ok(Event::Eof) => break,
                Ok(Event::Start(_)) => {
                    if self.root.is_some() && self.open.is_empty() {
                        return Err(self.position.error("a second root element", EDITED));
                    }
                    let element = self.start_tag(raw, false)?;
                    if self.open.len() >= MAX_DEPTH {
                        return Err(self.position.error(
                            format!("elements nest deeper than {MAX_DEPTH} levels"),
                            "this is not a settings file",
                        ));
                    }
                    self.open.push(element);
                }
                Ok(Event::Empty(_)) => {
                    let element = self.start_tag(raw, true)?;
                    self.close(element)?;
                }
                Ok(Event::End(_)) => {
                    let Some(mut element) = self.open.pop() else {
                        return Err(self.position.error("an end tag without a start tag", EDITED));
                    };
                    element.close_space = raw
                        .strip_prefix("</")
                        .and_then(|rest| rest.strip_prefix(element.name.as_str()))
                        .and_then(|rest| rest.strip_suffix('>'))
                        .filter(|space| space.chars().all(is_space))
                        .ok_or_else(|| self.position.error(format!("malformed end tag {raw}"), EDITED))?
                        .to_owned();
                    self.close(element)?;
                }
                Ok(Event::Text(_) | Event::GeneralRef(_)) => self.character_data(raw)?,
                Ok(Event::DocType(_)) => {
                    return Err(self.position.error(
                        "a document type declaration, which settings files do not have",
                        "remove the <!DOCTYPE …> and the entities it declares",
                    ));
                }
                Ok(Event::Decl(declaration)) => {
                    if let Some(Ok(encoding)) = declaration.encoding() {
                        if !encoding.eq_ignore_ascii_case("utf-8")
                            && !encoding.eq_ignore_ascii_case("us-ascii")
                        {
                            return Err(self
                                .position
                                .error(format!("the encoding is {}", encoding), "save the file as UTF-8"));
                        }
                    }
                    self.add(Node::Verbatim(raw.to_owned()));
                }
                Ok(Event::CData(_)) => {
                    if self.open.is_empty() {
                        return Err(self.position.error("character data outside the root element", EDITED));
                    }
                    self.check_characters(raw)?;
                    self.add(Node::Verbatim(raw.to_owned()));
                }
                Ok(Event::Comment(_) | Event::PI(_)) => {
                    self.check_characters(raw)?;
                    self.add(Node::Verbatim(raw.to_owned()));
                }
            }
            self.position.advance(raw);
            start = end;
        }
        if let Some(open) = self.open.last() {
            let (line, column) = open.position();
            return Err(ContentError::new(line, column, format!("<{}> is never closed", open.name), EDITED));
        }
        let Some(root) = self.root else {
            return Err(self
                .position
                .error("no root element: the file is empty", "restore the file from a copy"));
        };
        Ok(Document { byte_order_mark: false, before: self.before, root, after: self.after })
    }

    fn add(&mut self, node: Node) {
        let into = match self.open.last_mut() {
            Some(element) => &mut element.children,
            None if self.root.is_some() => &mut self.after,
            None => &mut self.before,
        };
        if let (Some(Node::Text(last)), Node::Text(more)) = (into.last_mut(), &node) {
            last.push_str(more);
        } else {
            into.push(node);
        }
    }

    fn close(&mut self, element: Element) -> Result<(), ContentError> {
        if !self.open.is_empty() {
            self.add(Node::Element(element));
        } else if self.root.is_some() {
            return Err(self.position.error("a second root element", "keep one of them"));
        } else {
            self.root = Some(element);
        }
        Ok(())
    }

    fn character_data(&mut self, raw: &str) -> Result<(), ContentError> {
        if self.open.is_empty() && !raw.chars().all(is_space) {
            return Err(self.position.error("text outside the root element", "remove it"));
        }
        self.check_references(raw)?;
        self.add(Node::Text(raw.to_owned()));
        Ok(())
    }

    fn check_characters(&self, raw: &str) -> Result<(), ContentError> {
        match raw.chars().find(|&c| !is_xml_char(c)) {
            Some(bad) => Err(self.position.error(
                format!("the character U+{:04X}, which XML does not allow", u32::from(bad)),
                "remove it",
            )),
            None => Ok(()),
        }
    }

    fn check_references(&self, raw: &str) -> Result<(), ContentError> {
        self.check_characters(raw)?;
        if raw.contains('&') {
            let value = unescape_with(raw, resolve_xml_entity)
                .map_err(|error| self.position.error(error.to_string(), "write an ampersand as &amp;"))?;
            self.check_characters(&value)?;
        }
        Ok(())
    }

    /// Splits a start tag into name, attributes and the white space between.
    fn start_tag(&self, raw: &str, empty_tag: bool) -> Result<Element, ContentError> {
        const MEND: &str = "correct the tag";
        let malformed = |what: String| self.position.error(what, MEND);
        let inside = raw
            .strip_prefix('<')
            .and_then(|rest| rest.strip_suffix(if empty_tag { "/>" } else { ">" }))
            .ok_or_else(|| malformed(format!("malformed tag {raw}")))?;
        let name_end = inside.find(is_space).unwrap_or(inside.len());
        let (name, mut rest) = inside.split_at(name_end);
        if !is_name(name) {
            return Err(malformed(format!("'{name}' is not an element name")));
        }
        let mut element = Element {
            name: name.to_owned(),
            empty_tag,
            line: self.position.line,
            column: self.position.column,
            ..Element::default()
        };
        loop {
            let space_end = rest.find(|c| !is_space(c)).unwrap_or(rest.len());
            let (space, after_space) = rest.split_at(space_end);
            if after_space.is_empty() {
                element.tag_end = space.to_owned();
                return Ok(element);
            }
            let name_end = after_space.find(|c| is_space(c) || c == '=').unwrap_or(after_space.len());
            let (name, after_name) = after_space.split_at(name_end);
            if space.is_empty() || !is_name(name) {
                return Err(malformed(format!("in <{}>: '{name}' is not an attribute name", element.name)));
            }
            let equals_end = after_name.find(|c| !is_space(c) && c != '=').unwrap_or(after_name.len());
            let (equals, after_equals) = after_name.split_at(equals_end);
            let quote = after_equals.chars().next().filter(|q| matches!(q, '"' | '\''));
            let (Some(quote), 1) = (quote, equals.matches('=').count()) else {
                return Err(malformed(format!("in <{}>: {name} has no quoted value", element.name)));
            };
            let Some((value, after_value)) = after_equals[1..].split_once(quote) else {
                return Err(malformed(format!(
                    "in <{}>: the value of {name} has no closing quote",
                    element.name
                )));
            };
            if value.contains('<') {
                return Err(malformed(format!("in <{}>: the value of {name} holds '<'", element.name)));
            }
            self.check_references(value)?;
            if element.attributes.len() >= MAX_ATTRIBUTES {
                return Err(self.position.error(
                    format!("<{}> has more than {MAX_ATTRIBUTES} attributes", element.name),
                    "this is not a settings file",
                ));
            }
            if element.attributes.iter().any(|a| a.name == name) {
                return Err(malformed(format!("in <{}>: {name} is given twice", element.name)));
            }
            element.attributes.push(Attribute {
                space: space.to_owned(),
                name: name.to_owned(),
                equals: equals.to_owned(),
                quote,
                raw: value.to_owned(),
            });
            rest = after_value;
        }
    }
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// Whether `name` can stand as a name. Looser than XML beyond ASCII, where it does not matter here.
fn is_name(name: &str) -> bool {
    let start = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':' || !c.is_ascii();
    name.chars().next().is_some_and(start)
        && name.chars().all(|c| start(c) || c.is_ascii_digit() || c == '-' || c == '.')
}

/// Escapes an attribute's value as libxml2 does, which is what VirtualBox writes with: all but ASCII by number,
/// because the XML declaration names no encoding.
fn escape_attribute(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push_str("&#9;"),
            c => escape_char(&mut out, c),
        }
    }
    out
}

fn escape_text(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    value.chars().for_each(|c| escape_char(&mut out, c));
    out
}

fn escape_char(out: &mut String, c: char) {
    match c {
        '&' => out.push_str("&amp;"),
        '<' => out.push_str("&lt;"),
        '>' => out.push_str("&gt;"),
        '\r' => out.push_str("&#13;"),
        // Left as it is, to be found by the check for what XML cannot express.
        c if c.is_ascii() || !is_xml_char(c) => out.push(c),
        c => out.push_str(&format!("&#x{:X};", u32::from(c))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Document {
        Document::parse(text.as_bytes()).unwrap()
    }

    fn error(text: &str) -> ContentError {
        Document::parse(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn what_was_read_comes_back_byte_for_byte() {
        for text in [
            "<a/>",
            "\u{feff}<?xml version=\"1.0\" encoding='UTF-8'?>\r\n<!-- c -- >-->\n<a\n  b = 'x&quot;y'\tc=\"&#10;\"  />\n\n",
            "<a><b></b><c />t&amp;e<![CDATA[<x>&]]>x<?pi some?></a ><!--end-->",
            "<?xml version=\"1.0\"?><n:a xmlns:n=\"u\"><n:b\u{e9}/>\r\n \t</n:a>",
        ] {
            // A comment may not hold two hyphens; the reader does not insist.
            assert_eq!(parse(text).to_text(), text);
        }
    }

    #[test]
    fn values_are_unescaped_and_normalized() {
        let document = parse("<a b=\"1&lt;2&#x41;&#10;\nx\">t&amp;<c/><![CDATA[&]]></a>");
        assert_eq!(document.root().attribute("b").unwrap(), "1<2A\n x");
        assert_eq!(document.root().text(), "t&&");
    }

    #[test]
    fn values_that_are_set_are_read_back_equal() {
        let mut document = parse("<a b='old'/>");
        document.root_mut().set_attribute("b", "q\"<&>\n\t\r'");
        document.root_mut().set_attribute("c", "new");
        assert_eq!(document.to_text(), "<a b=\"q&quot;&lt;&amp;&gt;&#10;&#9;&#13;'\" c=\"new\"/>");
        assert_eq!(parse(&document.to_text()).root().attribute("b").unwrap(), "q\"<&>\n\t\r'");
    }

    #[test]
    fn what_is_not_ascii_is_written_by_number() {
        let mut document = parse("<a/>");
        document.root_mut().set_attribute("b", "á€\u{1f980}");
        document.root_mut().set_text("é");
        assert_eq!(document.to_text(), "<a b=\"&#xE1;&#x20AC;&#x1F980;\">&#xE9;</a>");
        assert_eq!(parse(&document.to_text()).root().attribute("b").unwrap(), "á€\u{1f980}");
    }

    #[test]
    fn setting_an_equal_value_keeps_its_spelling() {
        let mut document = parse("<a b='1&#62;0'/>");
        document.root_mut().set_attribute("b", "1>0");
        assert_eq!(document.to_text(), "<a b='1&#62;0'/>");
    }

    #[test]
    fn what_is_not_well_formed_is_refused_with_its_place() {
        let at = |text: &str| {
            let e = error(text);
            (e.line, e.column)
        };
        assert_eq!(at("<a>\n  <b></c>\n</a>").0, 2);
        assert_eq!(at("<a>\n <b c=1/></a>"), (2, 2));
        assert_eq!(at("<a>\n <b c='1' c='2'/></a>"), (2, 2));
        assert_eq!(at("<a><b>"), (1, 4));
        for text in [
            "",
            "  ",
            "<a/><b/>",
            "x<a/>",
            "<a/>x",
            "<a b='&nope;'/>",
            "<a>&#1;</a>",
            "<a>\u{1}</a>",
            "<1/>",
            "<a b='<'/>",
        ] {
            error(text);
        }
        assert!(Document::parse(b"<a>\xff</a>").unwrap_err().what.contains("0xff"));
    }

    #[test]
    fn document_types_and_foreign_encodings_are_refused() {
        assert!(error("<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>").what.contains("document type"));
        assert!(error("<?xml version='1.0' encoding='ISO-8859-1'?><a/>").what.contains("ISO-8859-1"));
    }

    #[test]
    fn nesting_is_limited() {
        let nested = |depth: usize| format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth));
        assert_eq!(parse(&nested(MAX_DEPTH)).to_text(), nested(MAX_DEPTH));
        assert!(error(&nested(MAX_DEPTH + 1)).what.contains("nest deeper"));
    }

    #[test]
    fn attributes_are_limited() {
        let with = |count: usize| {
            let attributes: String = (0..count).map(|n| format!(" a{n}=''")).collect();
            Document::parse(format!("<a{attributes}/>").as_bytes())
        };
        assert!(with(MAX_ATTRIBUTES).is_ok());
        assert!(with(MAX_ATTRIBUTES + 1).unwrap_err().what.contains("more than 256 attributes"));
    }

    #[test]
    fn new_elements_are_laid_out_as_virtualbox_does() {
        let mut root = Element::new("VirtualBox");
        let mut machine = Element::new("Machine");
        machine.set_attribute("name", "x");
        let mut description = Element::new("Description");
        description.set_text("two\nlines");
        machine.push(Node::Element(description));
        machine.push(Node::Element(Element::new("Hardware")));
        root.push(Node::Element(machine));
        root.indent("\n", "");
        let text = Document::new(root).to_text();
        let body = text.split_once("-->\n").unwrap().1;
        assert_eq!(
            body,
            "<VirtualBox>\n  <Machine name=\"x\">\n    <Description>two\nlines</Description>\n    <Hardware/>\n  </Machine>\n</VirtualBox>\n"
        );
        assert_eq!(parse(&text).to_text(), text);
    }
}
