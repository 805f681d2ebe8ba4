//! Settings out of a document, and changed settings back into it.

use crate::codec::{Section, Walk};
use crate::error::ContentError;
use crate::model::{GlobalSettings, MachineSettings};
use crate::version::SettingsVersion;
use crate::xml::{Archive, Document, Element, Node, merge};

const NAMESPACE: &str = "http://www.virtualbox.org/";

/// Why a document is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error("{0}")]
    Content(#[from] ContentError),
    #[error("settings version {0} is newer than {newest}, the newest this program knows", newest = SettingsVersion::NEWEST)]
    Newer(String),
}

/// What a change did to a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Whether the document is another one than before.
    pub changed: bool,
    /// The version the document had.
    pub from: SettingsVersion,
    /// The version it has now, the lowest from `from` on that can express the settings.
    pub to: SettingsVersion,
}

macro_rules! document_api {
    ($settings:ty, $what:literal) => {
        impl $settings {
            #[doc = concat!("The settings of ", $what, " that `document` describes, and its version.")]
            pub fn load(document: &Document) -> Result<(Self, SettingsVersion), LoadError> {
                load(document)
            }

            /// Changes in `document` what differs from these settings, and nothing else. The version rises if
            /// it must. On an error the document is as it was.
            pub fn apply(&self, document: &mut Document) -> Result<Applied, LoadError> {
                apply(self, document)
            }

            /// A new document, in the lowest version from 1.12 on that can express the settings.
            pub fn to_document(&self) -> Result<Document, ContentError> {
                create(self)
            }
        }
    };
}

document_api!(MachineSettings, "the machine");
document_api!(GlobalSettings, "the installation");

/// The version attribute of a document's root, and the version it means.
fn version(root: &Element) -> Result<(String, SettingsVersion), LoadError> {
    let (line, column) = root.position();
    let error = |what: String, mend: &str| LoadError::Content(ContentError::new(line, column, what, mend));
    if root.name() != "VirtualBox" {
        return Err(error(
            "Root element in VirtualBox settings files must be \"VirtualBox\"".into(),
            "this is not a settings file",
        ));
    }
    let Some(text) = root.attribute("version") else {
        return Err(error(
            "Required VirtualBox/@version attribute is missing".into(),
            "restore the file from a copy",
        ));
    };
    let Some((major, minor)) = SettingsVersion::parse(&text) else {
        return Err(error(
            format!("Cannot handle settings version '{text}'"),
            "restore the file from a copy",
        ));
    };
    match SettingsVersion::known(major, minor) {
        Some(version) => Ok((text.into_owned(), version)),
        None if major > 1 || (major == 1 && minor > 19) => Err(LoadError::Newer(text.into_owned())),
        None => Err(error(
            format!("Cannot handle settings version '{text}', which is older than {}", SettingsVersion::V1_7),
            "save the file once with a VirtualBox from 2.2 to 7.0",
        )),
    }
}

/// The version attribute of a document, as it stands.
pub(crate) fn version_text(document: &Document) -> String {
    version(document.root()).map(|(text, _)| text).unwrap_or_default()
}

pub(crate) fn load<S: Section>(document: &Document) -> Result<(S, SettingsVersion), LoadError> {
    let (settings, version, _) = walk(document)?;
    Ok((settings, version))
}

/// Reads a document, and gives the walk with which it is written the same way.
fn walk<S: Section>(document: &Document) -> Result<(S, SettingsVersion, Walk), LoadError> {
    let root = document.root();
    let (_, version) = version(root)?;
    let Some(element) = root.element(S::ELEMENT) else {
        let (line, column) = root.position();
        let (what, mend) = if root.element("MachineEncrypted").is_some() {
            ("the machine is encrypted".to_owned(), "remove the encryption with the VirtualBox that made it")
        } else {
            (
                format!("Required VirtualBox/{} element is missing", S::ELEMENT),
                "this is another kind of settings file",
            )
        };
        return Err(ContentError::new(line, column, what, mend).into());
    };
    let mut settings = S::default();
    let mut walk = Walk::new(version);
    settings.walk(&mut walk, &mut Archive::Read(element))?;
    Ok((settings, version, walk))
}

/// The settings as VirtualBox would write them.
fn write<S: Section + Clone>(settings: &S, mut walk: Walk) -> Result<Element, ContentError> {
    let mut element = Element::new(S::ELEMENT);
    settings.clone().walk(&mut walk, &mut Archive::Write(&mut element))?;
    element.check_expressible()?;
    Ok(element)
}

pub(crate) fn apply<S: Section + Clone + PartialEq>(
    settings: &S,
    document: &mut Document,
) -> Result<Applied, LoadError> {
    let (loaded, from, walk) = walk::<S>(document)?;
    if *settings == loaded {
        return Ok(Applied { changed: false, from, to: from });
    }
    let to = from.max(settings.lowest_version());
    let mut base = write(&loaded, walk)?;
    let new = write(settings, walk.raised_to(to))?;

    let mut changed = document.clone();
    let line_break = changed.line_break();
    let root = changed.root_mut();
    let indent = root.child_indent(S::ELEMENT);
    if to != from {
        root.set_attribute("version", &to.attribute());
        if from < SettingsVersion::V1_17 && to >= SettingsVersion::V1_17 {
            move_storage(&mut base);
            root.elements_mut().filter(|e| e.name() == S::ELEMENT).for_each(move_storage);
        }
    }
    if let Some(element) = root.element_mut(S::ELEMENT) {
        merge(element, &base, &new, line_break, &indent);
    }
    // The document may say outright what `base` leaves out or puts otherwise: a default of its old version where the
    // new one has another, or the name that stands for the host's own sound system. Where that now says
    // something else than is wanted, it differs from what is read back.
    let (now, _) = load::<S>(&changed)?;
    if now != *settings {
        let base = write(&now, walk.raised_to(to))?;
        if let Some(element) = changed.root_mut().element_mut(S::ELEMENT) {
            merge(element, &base, &new, line_break, &indent);
        }
    }
    if changed == *document {
        return Ok(Applied { changed: false, from, to });
    }
    *document = changed;
    Ok(Applied { changed: true, from, to })
}

/// Moves `<StorageControllers>` to where version 1.17 wants it: from beside the hardware into it. What is unknown in
/// it moves along.
fn move_storage(element: &mut Element) {
    for child in element.elements_mut() {
        if matches!(child.name(), "Snapshot" | "Snapshots") {
            move_storage(child);
        }
    }
    if element.element("Hardware").is_none() {
        return;
    }
    if let Some(mut storage) = element.take_element("StorageControllers") {
        storage.shift_right();
        if let Some(hardware) = element.element_mut("Hardware") {
            hardware.append_laid_out(storage);
        }
    }
}

pub(crate) fn create<S: Section + Clone>(settings: &S) -> Result<Document, ContentError> {
    let version = settings.lowest_version().max(SettingsVersion::V1_12);
    let mut root = Element::new("VirtualBox");
    root.set_attribute("xmlns", NAMESPACE);
    root.set_attribute("version", &version.attribute());
    root.push(Node::Element(write(settings, Walk::new(version))?));
    root.indent("\n", "");
    Ok(Document::new(root))
}
