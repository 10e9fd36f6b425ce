//! Domain names as the wire has them, in lower case.

use std::borrow::Borrow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// Longest name on the wire, its root label included (RFC 1035, 2.3.4).
pub const NAME_BYTES_MAX: usize = 255;
/// Longest label.
pub const LABEL_BYTES_MAX: usize = 63;

/// An absolute domain name in wire format and lower case: the key that records are found by.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<[u8]>);

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("{0:?}: a label is empty")]
    EmptyLabel(String),
    #[error("{0:?}: a label is longer than {LABEL_BYTES_MAX} bytes")]
    LongLabel(String),
    #[error("{0:?}: longer than {NAME_BYTES_MAX} bytes")]
    LongName(String),
    #[error(
        "{0:?}: a backslash stands before a character, or before three digits of a number up to 255"
    )]
    Escape(String),
}

impl Name {
    /// Parses dotted text; a closing dot changes nothing, every name here is absolute.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        if !matches!(text, "" | ".") {
            let mut labels = labels(text).ok_or_else(|| BadName::Escape(text.into()))?;
            labels.pop_if(|last| last.is_empty());
            for label in &labels {
                match label.len() {
                    0 => return Err(BadName::EmptyLabel(text.into())),
                    1..=LABEL_BYTES_MAX => {}
                    _ => return Err(BadName::LongLabel(text.into())),
                }
                wire.push(label.len() as u8);
                wire.extend(label.iter().map(u8::to_ascii_lowercase));
            }
        }
        wire.push(0);
        if wire.len() > NAME_BYTES_MAX {
            return Err(BadName::LongName(text.into()));
        }
        Ok(Self(wire.into()))
    }

    /// The root of all names.
    pub fn root() -> Self {
        Self(Arc::from([0]))
    }

    /// The name one label below this one.
    pub fn child(&self, label: &str) -> Result<Self, BadName> {
        let bad = || format!("{label}.{self}");
        match label.len() {
            0 => return Err(BadName::EmptyLabel(bad())),
            1..=LABEL_BYTES_MAX => {}
            _ => return Err(BadName::LongLabel(bad())),
        }
        if self.0.len() + 1 + label.len() > NAME_BYTES_MAX {
            return Err(BadName::LongName(bad()));
        }
        let mut wire = Vec::with_capacity(self.0.len() + 1 + label.len());
        wire.push(label.len() as u8);
        wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
        wire.extend_from_slice(&self.0);
        Ok(Self(wire.into()))
    }

    /// The name that PTR records of an address are found by.
    pub fn reverse(address: IpAddr) -> Self {
        let mut text = String::with_capacity(73);
        match address {
            IpAddr::V4(v4) => {
                let [a, b, c, d] = v4.octets();
                text = format!("{d}.{c}.{b}.{a}.in-addr.arpa");
            }
            IpAddr::V6(v6) => {
                for byte in v6.octets().iter().rev() {
                    text.push_str(&format!("{:x}.{:x}.", byte & 15, byte >> 4));
                }
                text.push_str("ip6.arpa");
            }
        }
        Self::parse(&text).expect("34 short labels at most are a name")
    }

    pub fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The same, for others to keep.
    pub(crate) fn shared(&self) -> &Arc<[u8]> {
        &self.0
    }

    /// This name and every one above it, the root last, each as wire format.
    pub fn and_ancestors(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::successors(Some(self.wire()), |name| parent(name))
    }

    /// Whether this name is `zone` or below it.
    pub fn is_in(&self, zone: &Name) -> bool {
        before(self.wire(), zone.wire()).is_some()
    }

    /// The number of labels; none for the root.
    pub fn labels(&self) -> usize {
        self.and_ancestors().count() - 1
    }

    /// Whether this is a zone of reversed addresses: PTR records are all it has.
    pub fn is_reverse(&self) -> bool {
        const TREES: [&[u8]; 2] = [b"\x07in-addr\x04arpa\0", b"\x03ip6\x04arpa\0"];
        TREES
            .into_iter()
            .any(|tree| before(self.wire(), tree).is_some())
    }

    /// A name from wire format that has been checked, lower case included.
    pub(crate) fn from_wire(wire: &[u8]) -> Self {
        Self(wire.into())
    }
}

/// The labels of a name below an origin that is told apart, in wire format and lower case: `web.prod.svc` of
/// `web.prod.svc.cluster.local.`, whatever the cluster's domains are. Empty for the origin itself.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Relative(Arc<[u8]>);

impl Relative {
    /// The origin itself.
    pub fn origin() -> Self {
        Self(Arc::from([]))
    }

    /// The name one label below this one, for origins of `origin_bytes_max` on the wire.
    pub fn child(&self, label: &str, origin_bytes_max: usize) -> Result<Self, BadName> {
        let bad = || format!("{label}.{self}");
        match label.len() {
            0 => return Err(BadName::EmptyLabel(bad())),
            1..=LABEL_BYTES_MAX => {}
            _ => return Err(BadName::LongLabel(bad())),
        }
        if self.0.len() + 1 + label.len() + origin_bytes_max > NAME_BYTES_MAX {
            return Err(BadName::LongName(bad()));
        }
        let mut wire = Vec::with_capacity(self.0.len() + 1 + label.len());
        wire.push(label.len() as u8);
        wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
        wire.extend_from_slice(&self.0);
        Ok(Self(wire.into()))
    }

    pub fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The same, for others to keep.
    pub(crate) fn shared(&self) -> &Arc<[u8]> {
        &self.0
    }

    /// A name from wire format that has been checked, lower case included.
    pub(crate) fn from_wire(wire: &[u8]) -> Self {
        Self(wire.into())
    }

    /// The absolute name below `origin`.
    pub fn under(&self, origin: &Name) -> Name {
        Name([self.wire(), origin.wire()].concat().into())
    }
}

impl fmt::Display for Relative {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.wire();
        while let Some((&length, after)) = rest.split_first() {
            let (label, next) = after.split_at(usize::from(length).min(after.len()));
            write_label(f, label)?;
            rest = next;
            if !rest.is_empty() {
                f.write_str(".")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Relative {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Writes a label so that it can be read back, and that no client can have anything else printed (RFC 1035, 5.1).
fn write_label(f: &mut fmt::Formatter<'_>, label: &[u8]) -> fmt::Result {
    for byte in label {
        match byte {
            b'.' | b'\\' | b'"' | b';' | b'(' | b')' | b'@' | b'$' => {
                write!(f, "\\{}", char::from(*byte))?
            }
            0x21..=0x7e => write!(f, "{}", char::from(*byte))?,
            _ => write!(f, "\\{byte:03}")?,
        }
    }
    Ok(())
}

/// The labels of dotted text, in which a backslash stands before a dot that is none, and before a byte's three digits.
fn labels(text: &str) -> Option<Vec<Vec<u8>>> {
    let mut labels = vec![Vec::new()];
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        let label = labels.last_mut()?;
        match (byte, after) {
            (b'.', _) => labels.push(Vec::new()),
            (b'\\', [a, b, c, after @ ..])
                if [a, b, c].iter().all(|digit| digit.is_ascii_digit()) =>
            {
                let digit = |digit: &u8| u16::from(digit - b'0');
                label.push(u8::try_from(digit(a) * 100 + digit(b) * 10 + digit(c)).ok()?);
                rest = after;
            }
            (b'\\', [digit, ..]) if digit.is_ascii_digit() => return None,
            (b'\\', [byte, after @ ..]) => {
                label.push(*byte);
                rest = after;
            }
            (b'\\', []) => return None,
            (byte, _) => label.push(*byte),
        }
    }
    Some(labels)
}

/// What stands before `origin` in a name in wire format: empty for the origin itself, `None` when the name is not in it.
pub fn before<'a>(wire: &'a [u8], origin: &[u8]) -> Option<&'a [u8]> {
    let split = wire.len().checked_sub(origin.len())?;
    if &wire[split..] != origin {
        return None;
    }
    // The same bytes may be within a label: only a boundary counts.
    let mut at = 0;
    while at < split {
        at += 1 + usize::from(wire[at]);
    }
    (at == split).then(|| &wire[..split])
}

/// Whether a name in wire format is in one of these zones.
pub fn in_any(wire: &[u8], zones: &[Name]) -> bool {
    let mut zones = zones.iter();
    zones.any(|zone| before(wire, zone.wire()).is_some())
}

/// Likewise, where none stands for all.
pub fn in_any_or_all(wire: &[u8], zones: &[Name]) -> bool {
    zones.is_empty() || in_any(wire, zones)
}

/// The name above `wire`; `None` for the root.
pub fn parent(wire: &[u8]) -> Option<&[u8]> {
    let length = usize::from(*wire.first()?);
    if length == 0 {
        None
    } else {
        wire.get(1 + length..)
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.len() == 1 {
            return f.write_str(".");
        }
        for name in self.and_ancestors().take_while(|name| name.len() > 1) {
            write_label(f, &name[1..=usize::from(name[0])])?;
            f.write_str(".")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lower_case_wire_format_and_print_absolute() {
        let name = Name::parse("Hello.Default").expect("a name");
        assert_eq!(name.wire(), b"\x05hello\x07default\0");
        assert_eq!(name.to_string(), "hello.default.");
        assert_eq!(Name::parse(".").expect("the root").to_string(), ".");
        assert_eq!(
            name.child("A").expect("a child"),
            Name::parse("a.hello.default.").expect("a name")
        );
    }

    #[test]
    fn whatever_bytes_a_label_has_it_is_printed_in_one_line_and_read_back() {
        let mut wire = vec![15];
        wire.extend(b"a.b\\c\n\x1b[31m\xff \"x");
        wire.push(0);
        let name = Name::from_wire(&wire);
        let text = name.to_string();
        assert_eq!(text, "a\\.b\\\\c\\010\\027[31m\\255\\032\\\"x.");
        assert_eq!(Name::parse(&text).expect("a name"), name);
        for bad in ["a\\", "a\\1", "a\\12x", "a\\256"] {
            assert!(matches!(Name::parse(bad), Err(BadName::Escape(_))), "{bad}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        assert!(matches!(Name::parse("a..b"), Err(BadName::EmptyLabel(_))));
        assert!(matches!(
            Name::parse(&"a".repeat(64)),
            Err(BadName::LongLabel(_))
        ));
        assert!(matches!(
            Name::parse(&["abcdefg"; 32].join(".")),
            Err(BadName::LongName(_))
        ));
        let long = Name::parse(&["abcdefg"; 31].join(".")).expect("249 bytes");
        assert!(matches!(long.child("abcdefg"), Err(BadName::LongName(_))));
    }

    #[test]
    fn reverse_names_of_both_families() {
        let v4 = Name::reverse("10.96.0.10".parse().expect("an address"));
        assert_eq!(v4.to_string(), "10.0.96.10.in-addr.arpa.");
        let v6 = Name::reverse("2001:db8::567:89ab".parse().expect("an address"));
        let expected = "b.a.9.8.7.6.5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.";
        assert_eq!(v6.to_string(), expected);
    }

    #[test]
    fn a_zone_holds_names_at_label_boundaries_only() {
        let zone = Name::parse("cluster.local").expect("a name");
        assert!(zone.is_in(&zone));
        assert!(Name::parse("a.cluster.local").expect("a name").is_in(&zone));
        assert!(!Name::parse("xcluster.local").expect("a name").is_in(&zone));
    }
}
