//! A Service and a slice as one piece of memory each, found by their names. Keys, texts and vectors of their own would take three times as
//! much as what they hold.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};

/// A Service of a namespace, with the names of its slices. The Service itself may be missing: slices may come before it.
pub struct PackedService(Box<[u8]>);

/// A slice of a namespace.
pub struct PackedSlice(Box<[u8]>);

/// A text with its length in front of it.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// What [`put`] has put, and what is behind it.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

fn text(bytes: &[u8]) -> &str {
    // They were put from texts.
    std::str::from_utf8(bytes).unwrap_or_default()
}

impl PackedService {
    pub fn new<'a>(
        name: &str,
        service: Option<&[u8]>,
        slices: impl Iterator<Item = &'a str>,
    ) -> Self {
        let mut out = Vec::new();
        put(&mut out, name.as_bytes());
        // A Service has a byte at least.
        put(&mut out, service.unwrap_or_default());
        for slice in slices {
            put(&mut out, slice.as_bytes());
        }
        Self(out.into())
    }

    pub fn name(&self) -> &str {
        split(&self.0).map_or("", |(name, _)| text(name))
    }

    /// Its bytes, and those of its slices' names.
    fn parts(&self) -> (&[u8], &[u8]) {
        split(&self.0)
            .and_then(|(_, rest)| split(rest))
            .unwrap_or_default()
    }

    /// The Service itself, as it was packed.
    pub fn service(&self) -> Option<&[u8]> {
        Some(self.parts().0).filter(|service| !service.is_empty())
    }

    pub fn slices(&self) -> impl Iterator<Item = &str> {
        let mut rest = self.parts().1;
        std::iter::from_fn(move || {
            let (name, behind) = split(rest)?;
            rest = behind;
            Some(text(name))
        })
    }
}

impl PackedSlice {
    pub fn new(name: &str, service: &str, slice: &[u8]) -> Self {
        let mut out = Vec::new();
        put(&mut out, name.as_bytes());
        put(&mut out, service.as_bytes());
        out.extend_from_slice(slice);
        Self(out.into())
    }

    pub fn name(&self) -> &str {
        split(&self.0).map_or("", |(name, _)| text(name))
    }

    /// The name of its Service, and the slice itself, as it was packed.
    pub fn parts(&self) -> (&str, &[u8]) {
        let parts = split(&self.0).and_then(|(_, rest)| split(rest));
        parts.map_or(("", &[]), |(service, slice)| (text(service), slice))
    }
}

macro_rules! found_by_name {
    ($kind:ty) => {
        impl Borrow<str> for $kind {
            fn borrow(&self) -> &str {
                self.name()
            }
        }

        impl Hash for $kind {
            fn hash<H: Hasher>(&self, state: &mut H) {
                self.name().hash(state);
            }
        }

        impl PartialEq for $kind {
            fn eq(&self, other: &Self) -> bool {
                self.name() == other.name()
            }
        }

        impl Eq for $kind {}
    };
}

found_by_name!(PackedService);
found_by_name!(PackedSlice);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_comes_out() {
        let service = PackedService::new("web", Some(b"x"), ["web-1", "web-2"].into_iter());
        assert_eq!(service.name(), "web");
        assert_eq!(service.service(), Some(&b"x"[..]));
        assert_eq!(service.slices().collect::<Vec<_>>(), ["web-1", "web-2"]);
        let missing = PackedService::new("", None, std::iter::empty());
        assert_eq!((missing.name(), missing.service()), ("", None));
        assert_eq!(missing.slices().count(), 0);
        let slice = PackedSlice::new("web-1", "web", b"yz");
        assert_eq!(slice.name(), "web-1");
        assert_eq!(slice.parts(), ("web", &b"yz"[..]));
    }
}
