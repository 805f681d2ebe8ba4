//! `vbox:Machine`: a settings file's `Machine` inside a descriptor.

use settings::MachineSettings;
use settings::xml::{Document, Element, Node};

use crate::error::Error;

const NAMESPACE: &str = "http://www.virtualbox.org/";

/// A name without its prefix.
pub(crate) fn local(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(_, local)| local)
}

/// The settings that the element holds.
pub(crate) fn read(name: &str, element: &Element) -> Result<MachineSettings, Error> {
    let mut machine = Element::new("Machine");
    let mut version = None;
    for attribute in element.attributes() {
        match attribute.name() {
            "version" => version = Some(attribute.value().into_owned()),
            name if name.contains(':') || name == "xmlns" => {}
            name => machine.set_attribute(name, &attribute.value()),
        }
    }
    for child in element.children() {
        match child {
            Node::Element(e) if local(e.name()) == "Info" => {}
            other => machine.push(other.clone()),
        }
    }
    let mut root = Element::new("VirtualBox");
    root.set_attribute("xmlns", NAMESPACE);
    root.set_attribute("version", version.as_deref().unwrap_or("1.12-linux"));
    root.push(Node::Element(machine));
    let error = |text: String| Error::Xml { name: name.to_owned(), text };
    let (settings, _) = MachineSettings::load(&Document::new(root)).map_err(|e| error(e.to_string()))?;
    Ok(settings)
}

/// The element that holds `settings`.
pub(crate) fn write(settings: &MachineSettings) -> Result<Element, Error> {
    let document = settings.to_document().map_err(|e| Error::content(e.to_string()))?;
    let root = document.root();
    let mut element = Element::new("vbox:Machine");
    element.set_attribute("ovf:required", "false");
    if let Some(version) = root.attribute("version") {
        element.set_attribute("version", &version);
    }
    if let Some(machine) = root.element("Machine") {
        for attribute in machine.attributes() {
            element.set_attribute(attribute.name(), &attribute.value());
        }
        let mut info = Element::new("ovf:Info");
        info.set_text("Complete VirtualBox machine configuration in VirtualBox format");
        element.push(Node::Element(info));
        for child in machine.children() {
            element.push(child.clone());
        }
    }
    Ok(element)
}
