use crate::{Addr, layout::plain};

/// Addresses of one family that a name may have to be answered in the kernel; names with more are the server's to answer.
pub const DNS_ADDRESSES: usize = 4;
/// Bytes of the longest name, its root label included (RFC 1035).
pub const DNS_NAME_BYTES: usize = 255;

/// In [`DnsZone::flags`]: recursion is available.
pub const DNS_RECURSION: u32 = 0x80;

/// Place in the array of programs: answers questions for cluster names. Empty while none are answered.
pub const POD_DNS: u32 = 0;
/// Place of what every other packet of a pod gets, and every question that is not answered.
pub const POD_INGRESS: u32 = 1;

/// What a name is found by: 128 bits of it, keyed by a number that nobody outside of the node knows.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NameKey {
    pub words: [u64; 2],
}
plain!(NameKey, 16, { words: 0 });

/// The addresses of a name, in the order in which the server has them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NameAddresses {
    /// The second word of its key: by it, and by `end`, whoever has read what is between them knows whose that was. The kernel gives an
    /// element that is removed or replaced to the next key at once, and writes it from one end to the other.
    pub begin: u64,
    /// The first [`NameAddresses::v4_count`] are set, each as the memory of its four bytes in network order.
    pub v4: [u32; DNS_ADDRESSES],
    /// The first [`NameAddresses::v6_count`] are set.
    pub v6: [Addr; DNS_ADDRESSES],
    pub v4_count: u8,
    pub v6_count: u8,
    /// Bytes of the name, its root label included: a second look at whether it is the one.
    pub name_bytes: u8,
    /// Bytes of the name before the cluster's domain.
    pub before: u8,
    /// The lower half of `begin`.
    pub end: u32,
}
plain!(NameAddresses, 96, { begin: 0, v4: 8, v6: 24, v4_count: 88, v6_count: 89, name_bytes: 90, before: 91, end: 92 });

impl NameAddresses {
    /// Of a name that has none yet.
    pub const NONE: Self = Self {
        begin: 0,
        v4: [0; DNS_ADDRESSES],
        v6: [Addr { words: [0, 0] }; DNS_ADDRESSES],
        v4_count: 0,
        v6_count: 0,
        name_bytes: 0,
        before: 0,
        end: 0,
    };

    /// The same as they lie in the map, under their key.
    pub const fn under(self, key: &NameKey) -> Self {
        Self {
            begin: key.words[1],
            end: key.words[1] as u32,
            ..self
        }
    }

    /// Whether what was read under a key is of that key.
    #[inline(always)]
    pub const fn is_under(&self, key: &NameKey) -> bool {
        self.begin == key.words[1] && self.end == key.words[1] as u32
    }
}

/// What answers have in common. It changes while nothing is answered, but for the serial.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DnsZone {
    /// The key of [`NameKey`]s.
    pub seed: [u64; 2],
    /// Serial of the SOA record.
    pub serial: u32,
    /// Time to live of records and of "no data".
    pub ttl_s: u32,
    /// The largest answer by UDP that the server gives, told to clients that speak EDNS.
    pub udp_bytes: u32,
    /// What the second byte of an answer's flags has: [`DNS_RECURSION`], or 0.
    pub flags: u32,
}
plain!(DnsZone, 32, { seed: 0, serial: 16, ttl_s: 20, udp_bytes: 24, flags: 28 });

/// What is counted of questions at the pods' interfaces; the index of a per-CPU counter.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DnsCount {
    /// Questions for A that were answered,
    A,
    /// and for AAAA.
    Aaaa,
    /// Those of both whose name has only addresses of the other family.
    NoData,
    /// Questions that were left to the server.
    Left,
}

impl DnsCount {
    pub const ALL: [Self; 4] = [Self::A, Self::Aaaa, Self::NoData, Self::Left];
    pub const COUNT: u32 = Self::ALL.len() as u32;

    /// Name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::Aaaa => "aaaa",
            Self::NoData => "nodata",
            Self::Left => "left",
        }
    }
}

/// The key of a name of so many bytes in wire format, whatever its case. `word` gives its bytes eight at a time, the first in the lowest
/// bits; what it gives beyond the name is not looked at. `seen` is given each word as the name spells it, zeros behind its end.
#[inline(always)]
pub fn name_key(
    seed: [u64; 2],
    bytes: usize,
    word: impl Fn(usize) -> u64,
    mut seen: impl FnMut(u64),
) -> NameKey {
    const MULTIPLIERS: [u64; 2] = [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f];
    let mut a = seed[0] ^ bytes as u64;
    let mut b = seed[1];
    let mut take = |bits: u64| {
        seen(bits);
        let bits = lower_case(bits);
        a = (a ^ bits).wrapping_mul(MULTIPLIERS[0]);
        a ^= a >> 29;
        b = (b ^ bits.rotate_left(32)).wrapping_mul(MULTIPLIERS[1]);
        b ^= b >> 31;
    };
    // Only the last word is cut, behind the loop: a choice in each is one that the verifier follows in each.
    let whole = bytes / 8;
    let mut i = 0;
    while i < DNS_NAME_BYTES / 8 && i < whole {
        take(word(i));
        i += 1;
    }
    take(word(i) & ((1 << (bytes % 8 * 8)) - 1));
    NameKey { words: [a, b] }
}

/// Eight bytes with A to Z made small. Lengths of labels are below them all.
#[inline(always)]
fn lower_case(word: u64) -> u64 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let low = word & (EACH * 0x7f);
    let from_a = low + EACH * (0x80 - b'A' as u64);
    let after_z = low + EACH * (0x7f - b'Z' as u64);
    let ascii = !word & (EACH * 0x80);
    word | ((from_a ^ after_z) & ascii) >> 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: [u64; 2], name: &[u8]) -> NameKey {
        let mut spelt = 0;
        let key = name_key(
            seed,
            name.len(),
            |i| {
                let mut bytes = [0xff; 8];
                let rest = &name[i * 8..];
                let taken = rest.len().min(8);
                bytes[..taken].copy_from_slice(&rest[..taken]);
                u64::from_le_bytes(bytes)
            },
            |word| {
                spelt += word
                    .to_le_bytes()
                    .iter()
                    .map(|byte| *byte as usize)
                    .sum::<usize>()
            },
        );
        assert_eq!(spelt, name.iter().map(|byte| *byte as usize).sum());
        key
    }

    #[test]
    fn every_byte_is_made_small_as_ascii_has_it() {
        for byte in 0..=u8::MAX {
            let all = u64::from_le_bytes([byte, b'A', byte, b'z', 0, byte, 0xff, b'[']);
            let small =
                [byte, b'A', byte, b'z', 0, byte, 0xff, b'['].map(|b| b.to_ascii_lowercase());
            assert_eq!(lower_case(all).to_le_bytes(), small, "{byte}");
        }
    }

    #[test]
    fn keys_differ_by_name_length_and_seed_and_not_by_case() {
        let seed = [7, 9];
        let name = b"\x03web\x04prod\x03svc\x07cluster\x05local\0";
        assert_eq!(key(seed, name), key(seed, &name.to_ascii_uppercase()));
        assert_ne!(key(seed, name), key([7, 8], name));
        assert_ne!(key(seed, name), key([8, 9], name));
        assert_ne!(key(seed, name), key(seed, &name[..name.len() - 1]));
        for at in 0..name.len() {
            let mut other = *name;
            other[at] ^= 1;
            let [a, b] = key(seed, &other).words;
            let same = key(seed, name).words;
            assert!(
                a != same[0] && b != same[1],
                "both halves depend on byte {at}"
            );
        }
    }
}
