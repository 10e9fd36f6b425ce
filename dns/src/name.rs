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
}

impl Name {
    /// Parses dotted text; a closing dot changes nothing, every name here is absolute.
    pub fn parse(text: &str) -> Result<Self, BadName> {
        let inner = text.strip_suffix('.').unwrap_or(text);
        let mut wire = Vec::with_capacity(inner.len() + 2);
        if !inner.is_empty() {
            for label in inner.split('.') {
                match label.len() {
                    0 => return Err(BadName::EmptyLabel(text.into())),
                    1..=LABEL_BYTES_MAX => {}
                    _ => return Err(BadName::LongLabel(text.into())),
                }
                wire.push(label.len() as u8);
                wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
            }
        }
        wire.push(0);
        if wire.len() > NAME_BYTES_MAX {
            return Err(BadName::LongName(text.into()));
        }
        Ok(Self(wire.into()))
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
            write!(f, "{}", String::from_utf8_lossy(label))?;
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
            write!(
                f,
                "{}.",
                String::from_utf8_lossy(&name[1..=usize::from(name[0])])
            )?;
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
