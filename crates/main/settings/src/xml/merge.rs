//! Bringing a change of the typed settings into the document they were read from.
//!
//! Three trees take part: the document, `base` (what the settings would have been written as before the change)
//! and `new` (what they are written as now). Only the difference between `base` and `new` is applied to the
//! document. Hence no change leaves every byte alone, and what the typed settings do not know stays: unknown
//! elements and attributes, comments, white space, spellings.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::dom::{Element, Node};

/// How an element is told from its siblings: by name, by what makes it itself, and by its number among those
/// that agree in both.
type Key = (String, Vec<String>, usize);

/// The attributes that make an element of a list itself, if it is one. Elements without an entry are told apart
/// by name, and if there are several, by order.
fn identity(parent: &str, name: &str) -> Option<&'static [&'static str]> {
    Some(match (parent, name) {
        ("AttachedDevice", "Image") => return None,
        (_, "Image" | "HardDisk" | "Snapshot" | "MachineEntry") => &["uuid"],
        ("Adapter" | "DisabledModes", "NATNetwork" | "HostOnlyNetwork" | "CloudNetwork") => return None,
        (_, "DHCPServer" | "NATNetwork") => &["networkName"],
        (
            _,
            "ExtraDataItem" | "Property" | "Forwarding" | "SharedFolder" | "GuestProperty" | "BandwidthGroup"
            | "StorageController" | "Controller" | "Group" | "Option" | "HostOnlyNetwork" | "CloudNetwork"
            | "USBDeviceSource",
        ) => &["name"],
        (_, "Adapter" | "Port") => &["slot"],
        (_, "Order") => &["position"],
        (_, "Cpu" | "Screen") => &["id"],
        (_, "CpuIdLeaf") => &["id", "subleaf"],
        (_, "AttachedDevice") => &["port", "device"],
        (_, "Device") => &["host"],
        (_, "Loopback4") => &["address"],
        (_, "DeviceFilter" | "Condition" | "Config") => &[],
        _ => return None,
    })
}

/// The name that VirtualBox writes now for an element that it once wrote under another one.
fn canonical_name(name: &str) -> &str {
    match name {
        "HostInterface" => "BridgedInterface",
        "VDE" => "GenericInterface",
        other => other,
    }
}

/// Whether the mere presence of an element says something, so that nothing of it may stay when it goes.
fn presence_matters(parent: &str, name: &str) -> bool {
    identity(parent, name).is_some()
        || matches!(
            canonical_name(name),
            "NAT"
                | "BridgedInterface"
                | "InternalNetwork"
                | "HostOnlyInterface"
                | "GenericInterface"
                | "NATNetwork"
                | "HostOnlyNetwork"
                | "CloudNetwork"
                | "Image"
                | "HostDrive"
                | "Description"
        )
}

/// An attribute's value for comparison: numbers and UUIDs in one spelling.
fn normalized(value: Cow<'_, str>) -> String {
    match value.parse::<i64>() {
        Ok(number) => number.to_string(),
        Err(_) if value.len() >= 32 => value.trim_matches(['{', '}']).to_ascii_lowercase(),
        Err(_) => value.into_owned(),
    }
}

/// The keys of the elements directly below `element`, in order.
fn keys(element: &Element) -> Vec<Key> {
    let parent = canonical_name(element.name());
    let mut seen: HashMap<(String, Vec<String>), usize> = HashMap::new();
    element
        .elements()
        .map(|child| {
            let name = canonical_name(child.name()).to_owned();
            let values = identity(parent, &name)
                .unwrap_or_default()
                .iter()
                .map(|attribute| child.attribute(attribute).map(normalized).unwrap_or_default())
                .collect::<Vec<_>>();
            let count = seen.entry((name.clone(), values.clone())).or_default();
            let number = *count;
            *count += 1;
            (name, values, number)
        })
        .collect()
}

fn index(keys: &[Key]) -> HashMap<&Key, usize> {
    keys.iter().enumerate().map(|(index, key)| (key, index)).collect()
}

/// Applies what changed from `base` to `new` to `document`; all three stand for the same element. `indent` is
/// the white space before the element's start tag.
pub(crate) fn merge(document: &mut Element, base: &Element, new: &Element, line_break: &str, indent: &str) {
    if base == new {
        return;
    }
    merge_attributes(document, base, new);
    if new.elements().next().is_none() && base.elements().next().is_none() {
        if base.text() != new.text() {
            document.set_text(&new.text());
        }
        return;
    }

    drop_shadowed(document, base);
    let base_children: Vec<&Element> = base.elements().collect();
    let new_children: Vec<&Element> = new.elements().collect();
    let base_keys = keys(base);
    let new_keys = keys(new);
    let in_base = index(&base_keys);
    let in_new = index(&new_keys);

    let going =
        base_keys.iter().zip(base_children.iter().copied()).filter(|(key, _)| !in_new.contains_key(key));
    remove(document, &going.collect(), line_break);

    let nothing = Element::EMPTY;
    let document_keys = keys(document);
    let in_document = index(&document_keys);
    let places = places(document);
    let mut missing = Vec::new();
    for (position, (key, new_child)) in new_keys.iter().zip(&new_children).enumerate() {
        let base_child = in_base.get(key).map(|&at| base_children[at]);
        if base_child == Some(*new_child) {
            continue;
        }
        match in_document.get(key) {
            Some(&nth) => {
                let at = places[nth];
                let child_indent = indent_before(document, at).unwrap_or_else(|| format!("{indent}  "));
                if let Node::Element(child) = &mut document.children[at] {
                    merge(child, base_child.unwrap_or(&nothing), new_child, line_break, &child_indent);
                }
            }
            None => missing.push(position),
        }
    }
    // Neighbours in a list go in together.
    let in_list = order(canonical_name(document.name())).is_empty();
    for run in missing.chunk_by(|a, b| in_list && a + 1 == *b) {
        insert(document, &new_keys, run, &new_children, line_break, indent);
    }

    let kept_before = base_keys.iter().filter(|key| in_new.contains_key(key));
    let kept_now = new_keys.iter().filter(|key| in_base.contains_key(key));
    if !kept_before.eq(kept_now) {
        reorder(document, &in_new);
    }
    close_if_empty(document);
}

fn merge_attributes(document: &mut Element, base: &Element, new: &Element) {
    for (position, attribute) in new.attributes().iter().enumerate() {
        let value = attribute.value();
        if base.attribute(attribute.name()).is_some_and(|before| before == value) {
            continue;
        }
        let at = new.attributes()[..position]
            .iter()
            .rev()
            .find_map(|earlier| document.attributes().iter().position(|a| a.name() == earlier.name()))
            .map_or(0, |before| before + 1);
        document.set_attribute_at(at, attribute.name(), &value);
    }
    for attribute in base.attributes() {
        if new.attribute(attribute.name()).is_none() {
            document.remove_attribute(attribute.name());
        }
    }
}

/// The places of the elements among all nodes.
fn places(element: &Element) -> Vec<usize> {
    let elements = element.children.iter().enumerate().filter(|(_, node)| matches!(node, Node::Element(_)));
    elements.map(|(at, _)| at).collect()
}

/// The white space between the last line break and the node at `at`.
fn indent_before(element: &Element, at: usize) -> Option<String> {
    match element.children.get(at.checked_sub(1)?)? {
        Node::Text(text) => {
            let (_, space) = text.rsplit_once('\n')?;
            space.chars().all(|c| c == ' ' || c == '\t').then(|| space.to_owned())
        }
        _ => None,
    }
}

/// Takes out named values that a later one of the same name replaces when they are read, lest a change of the
/// value be made to one that does not count.
fn drop_shadowed(document: &mut Element, base: &Element) {
    let in_base: HashSet<Key> = keys(base).into_iter().collect();
    let mut surplus: HashMap<Key, usize> = HashMap::new();
    for (name, values, number) in keys(document) {
        if matches!(name.as_str(), "ExtraDataItem" | "Property") && number > 0 {
            let key = (name, values, number);
            if !in_base.contains(&key) {
                *surplus.entry((key.0, key.1, 0)).or_default() += 1;
            }
        }
    }
    let shadowed: Vec<Key> = surplus
        .into_iter()
        .flat_map(|((name, values, _), count)| {
            (0..count).map(move |number| (name.clone(), values.clone(), number))
        })
        .collect();
    let nothing = Element::EMPTY;
    remove(document, &shadowed.iter().map(|key| (key, &nothing)).collect(), "");
}

/// Takes elements out of the document; each comes with what it was written as. What is not known about it stays
/// behind, unless its presence would mean something.
fn remove(document: &mut Element, going: &HashMap<&Key, &Element>, line_break: &str) {
    if going.is_empty() {
        return;
    }
    let parent = canonical_name(document.name()).to_owned();
    let mut stays = vec![true; document.children.len()];
    for (key, at) in keys(document).iter().zip(places(document)) {
        let Some(base) = going.get(key) else { continue };
        if let Node::Element(child) = &mut document.children[at] {
            if !presence_matters(&parent, &key.0) {
                merge(child, base, &Element::new(base.name()), line_break, "");
                if !child.attributes().is_empty() || child.elements().next().is_some() {
                    continue;
                }
            }
        }
        stays[at] = false;
        if let Some(before) = at.checked_sub(1) {
            if matches!(&document.children[before], Node::Text(text) if text.trim().is_empty()) {
                stays[before] = false;
            }
        }
    }
    let mut stays = stays.into_iter();
    document.children.retain(|_| stays.next().unwrap_or(true));
}

/// The order in which VirtualBox writes the children of an element that has one of each, including those that are
/// mostly left out.
#[rustfmt::skip]
fn order(parent: &str) -> &'static [&'static str] {
    match parent {
        "Machine" => &[
            "Description", "Teleporter", "MediaRegistry", "ExtraData", "Snapshot", "Hardware", "StorageControllers",
            "Debugging", "Autostart", "VideoCapture", "Recording", "Groups",
        ],
        "Hardware" => &[
            "CPU", "Memory", "Firmware", "HID", "HPET", "Chipset", "Paravirt", "Iommu", "Boot", "Display",
            "VideoCapture", "RemoteDisplay", "BIOS", "TrustedPlatformModule", "USBController", "USB", "Network", "UART",
            "LPT", "AudioAdapter", "RTC", "SharedFolders", "Clipboard", "DragAndDrop", "IO", "HostPci", "EmulatedUSB",
            "Frontend", "Guest", "GuestProperties", "StorageControllers",
        ],
        "CPU" => &[
            "HardwareVirtEx", "HardwareVirtExNestedPaging", "HardwareVirtExVPID", "HardwareVirtExUX", "PAE", "IBPBOn",
            "SpecCtrl", "SpecCtrlByHost", "L1DFlushOn", "MDSClearOn", "NestedHWVirt",
            "HardwareVirtExVirtVmsaveVmload", "LongMode", "TripleFaultReset", "X2APIC", "APIC",
            "HardwareVirtExLargePages", "HardwareVirtForce", "HardwareVirtExUseNativeApi", "CpuTree", "CpuIdTree",
        ],
        "BIOS" => &[
            "ACPI", "IOAPIC", "APIC", "Logo", "BootMenu", "TimeOffset", "PXEDebug", "NVRAM", "SmbiosUuidLittleEndian",
            "AutoSerialNumGen",
        ],
        _ => &[],
    }
}

/// Puts the elements that have the numbers `run` in `new_keys` where they belong among their siblings.
fn insert(
    document: &mut Element,
    new_keys: &[Key],
    run: &[usize],
    new_children: &[&Element],
    line_break: &str,
    indent: &str,
) {
    let (Some(&first), Some(&last)) = (run.first(), run.last()) else { return };
    let document_keys = keys(document);
    let in_document = index(&document_keys);
    let places = places(document);
    let child_indent =
        places.iter().find_map(|&at| indent_before(document, at)).unwrap_or_else(|| format!("{indent}  "));
    let space = || Node::Text(format!("{line_break}{child_indent}"));
    let element = |position: &usize| {
        let mut child = new_children[*position].clone();
        child.indent(line_break, &child_indent);
        Node::Element(child)
    };

    let order = order(canonical_name(document.name()));
    let rank = |name: &str| order.iter().position(|n| *n == name);
    let (after, before) = match rank(&new_keys[first].0) {
        Some(own) => (
            document_keys.iter().rposition(|key| rank(&key.0).is_some_and(|rank| rank < own)),
            document_keys.iter().position(|key| rank(&key.0).is_some_and(|rank| rank > own)),
        ),
        None => (
            new_keys[..first].iter().rev().find_map(|key| in_document.get(key).copied()),
            new_keys[last + 1..].iter().find_map(|key| in_document.get(key).copied()),
        ),
    };
    let after = after.or(if before.is_none() { places.len().checked_sub(1) } else { None });
    document.empty_tag = false;
    if let Some(nth) = after {
        let at = places[nth] + 1;
        let nodes: Vec<Node> = run.iter().flat_map(|position| [space(), element(position)]).collect();
        document.children.splice(at..at, nodes);
    } else if let Some(nth) = before {
        let at = places[nth];
        let nodes: Vec<Node> = run.iter().flat_map(|position| [element(position), space()]).collect();
        document.children.splice(at..at, nodes);
    } else {
        // No element yet: what white space there is separates nothing.
        document.children.retain(|node| !matches!(node, Node::Text(text) if text.trim().is_empty()));
        document.children.extend(run.iter().flat_map(|position| [space(), element(position)]));
        document.children.push(Node::Text(format!("{line_break}{indent}")));
    }
}

/// Brings the elements that `order` knows into its order, in the places that they have between them.
fn reorder(document: &mut Element, order: &HashMap<&Key, usize>) {
    let known: Vec<(usize, usize)> = keys(document)
        .iter()
        .zip(places(document))
        .filter_map(|(key, at)| Some((*order.get(key)?, at)))
        .collect();
    let mut elements: Vec<(usize, Node)> = known
        .iter()
        .map(|&(rank, at)| (rank, std::mem::replace(&mut document.children[at], Node::Text(String::new()))))
        .collect();
    elements.sort_by_key(|(rank, _)| *rank);
    for ((_, at), (_, node)) in known.into_iter().zip(elements) {
        document.children[at] = node;
    }
}

/// Writes an element that has lost its content as `<Name/>`.
fn close_if_empty(document: &mut Element) {
    let blank =
        document.children.iter().all(|node| matches!(node, Node::Text(text) if text.trim().is_empty()));
    if blank {
        document.children.clear();
        document.empty_tag = true;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Document;
    use super::*;

    fn merged(document: &str, base: &str, new: &str) -> String {
        let mut document = Document::parse(document.as_bytes()).unwrap();
        let base = Document::parse(base.as_bytes()).unwrap();
        let new = Document::parse(new.as_bytes()).unwrap();
        let line_break = document.line_break();
        merge(document.root_mut(), base.root(), new.root(), line_break, "");
        document.to_text()
    }

    #[test]
    fn without_a_change_nothing_changes() {
        let text = "<a  x = '1'>\n\t<u/><!-- c --> <b y='2'></b>\n</a>";
        assert_eq!(merged(text, "<a x='1'><b y='2'/><c/></a>", "<a x='1'><b y='2'/><c/></a>"), text);
    }

    #[test]
    fn attributes_change_in_place_and_new_ones_go_where_they_belong() {
        assert_eq!(
            merged("<a u='?' x='1' z='3'/>", "<a x='1' z='3'/>", "<a x='5' y='2' z='3'/>"),
            "<a u='?' x=\"5\" y=\"2\" z='3'/>"
        );
        assert_eq!(merged("<a u='?' x='1'/>", "<a x='1'/>", "<a/>"), "<a u='?'/>");
    }

    #[test]
    fn elements_are_inserted_in_order_and_in_the_documents_layout() {
        let document = "<a>\r\n\t<b/>\r\n\t<unknown/>\r\n\t<d/>\r\n</a>";
        assert_eq!(
            merged(document, "<a><b/><d/></a>", "<a><b/><c><e/></c><d/></a>"),
            "<a>\r\n\t<b/>\r\n\t<c>\r\n\t  <e/>\r\n\t</c>\r\n\t<unknown/>\r\n\t<d/>\r\n</a>"
        );
        assert_eq!(
            merged("<a>\n  <d/>\n</a>", "<a><d/></a>", "<a><b/><d/></a>"),
            "<a>\n  <b/>\n  <d/>\n</a>"
        );
        assert_eq!(merged("<a/>", "<a/>", "<a><b/></a>"), "<a>\n  <b/>\n</a>");
    }

    #[test]
    fn an_element_goes_to_its_place_even_among_those_that_say_nothing_new() {
        assert_eq!(
            merged(
                "<Hardware><CPU/><HPET enabled='false'/><mine/><Boot/></Hardware>",
                "<Hardware><CPU/></Hardware>",
                "<Hardware><CPU/><Paravirt provider='KVM'/></Hardware>"
            ),
            "<Hardware><CPU/><HPET enabled='false'/>\n  <Paravirt provider='KVM'/><mine/><Boot/></Hardware>"
        );
    }

    #[test]
    fn the_last_element_to_go_takes_the_layout_with_it() {
        assert_eq!(merged("<a>\n  <b/>\n</a>", "<a><b/></a>", "<a/>"), "<a/>");
        assert_eq!(
            merged("<a>\n  <b/>\n  <c/>\n</a>", "<a><b/><c/></a>", "<a><c/></a>"),
            "<a>\n  <c/>\n</a>"
        );
    }

    #[test]
    fn unknown_content_of_a_removed_element_stays_unless_presence_means_something() {
        assert_eq!(
            merged("<h>\n  <BIOS known='1' mine='2'/>\n</h>", "<h><BIOS known='1'/></h>", "<h/>"),
            "<h>\n  <BIOS mine='2'/>\n</h>"
        );
        assert_eq!(
            merged(
                "<Adapter slot='0'><NAT mine='2'/></Adapter>",
                "<Adapter slot='0'><NAT/></Adapter>",
                "<Adapter slot='0'><InternalNetwork name='x'/></Adapter>"
            ),
            "<Adapter slot='0'>\n  <InternalNetwork name='x'/>\n</Adapter>"
        );
    }

    #[test]
    fn list_elements_are_told_apart_by_what_makes_them_themselves() {
        let document = "<E>\n  <ExtraDataItem name='b' value='2' mine='m'/>\n  <ExtraDataItem name='c' value='3'/>\n</E>";
        assert_eq!(
            merged(
                document,
                "<E><ExtraDataItem name='b' value='2'/><ExtraDataItem name='c' value='3'/></E>",
                "<E><ExtraDataItem name='a' value='1'/><ExtraDataItem name='b' value='5'/></E>"
            ),
            "<E>\n  <ExtraDataItem name='a' value='1'/>\n  <ExtraDataItem name='b' value=\"5\" mine='m'/>\n</E>"
        );
        assert_eq!(
            merged(
                "<n><Adapter slot='010'/></n>",
                "<n><Adapter slot='10'/></n>",
                "<n><Adapter slot='10' cable='false'/></n>"
            ),
            "<n><Adapter slot='010' cable=\"false\"/></n>"
        );
    }

    #[test]
    fn several_elements_that_only_their_order_tells_apart_all_go() {
        let filter = "<DeviceFilter name='a'/>";
        let document = format!("<U>{filter}{filter}{filter}</U>");
        assert_eq!(merged(&document, &document, "<U/>"), "<U/>");
        assert_eq!(merged(&document, &document, &format!("<U>{filter}</U>")), format!("<U>{filter}</U>"));
    }

    #[test]
    fn of_values_with_the_same_name_the_one_that_counts_is_changed() {
        assert_eq!(
            merged(
                "<E><Property name='a' value='1'/><Property name='a' value='2'/></E>",
                "<E><Property name='a' value='2'/></E>",
                "<E><Property name='a' value='3'/></E>"
            ),
            "<E><Property name='a' value=\"3\"/></E>"
        );
    }

    #[test]
    fn an_older_name_of_an_element_is_recognized() {
        assert_eq!(
            merged(
                "<Adapter><HostInterface name='eth0'/></Adapter>",
                "<Adapter><BridgedInterface name='eth0'/></Adapter>",
                "<Adapter/>"
            ),
            "<Adapter/>"
        );
    }

    #[test]
    fn a_changed_order_is_followed_without_moving_anything_else() {
        assert_eq!(
            merged(
                "<S>\n  <SharedFolder name='a'/>\n  <!-- x -->\n  <SharedFolder name='b'/>\n</S>",
                "<S><SharedFolder name='a'/><SharedFolder name='b'/></S>",
                "<S><SharedFolder name='b'/><SharedFolder name='a'/></S>"
            ),
            "<S>\n  <SharedFolder name='b'/>\n  <!-- x -->\n  <SharedFolder name='a'/>\n</S>"
        );
    }

    #[test]
    fn text_is_replaced_when_it_changed() {
        assert_eq!(
            merged(
                "<m><Description>old &amp; grey</Description></m>",
                "<m><Description>old &amp; grey</Description></m>",
                "<m><Description>new\nlines</Description></m>"
            ),
            "<m><Description>new\nlines</Description></m>"
        );
    }
}
