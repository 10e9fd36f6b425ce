use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::layout::plain;

/// An IPv6 address, or an IPv4 one mapped into it (`::ffff:a.b.c.d`): one key shape for both families.
///
/// Two words rather than 16 bytes, because a zeroed byte array is filled by a loop in eBPF (26 to 50 ns measured).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr {
    /// The 16 bytes in network order, as two words of the machine's own memory.
    pub words: [u64; 2],
}
plain!(Addr, 16, { words: 0 });

impl Addr {
    /// The same address, word by word: where one may overlap the other, a copy of the whole is a loop over bytes.
    #[inline(always)]
    pub const fn again(&self) -> Self {
        let [first, second] = self.words;
        Self {
            words: [first, second],
        }
    }

    /// The IPv4 address whose four bytes in network order are the memory of `be`.
    #[inline(always)]
    pub const fn from_v4_be(be: u32) -> Self {
        // Bytes 8..10 are zero, 10..12 are ff, 12..16 the address.
        #[cfg(target_endian = "little")]
        let word = 0xffff_0000 | ((be as u64) << 32);
        #[cfg(target_endian = "big")]
        let word = 0x0000_ffff_0000_0000 | be as u64;
        Self { words: [0, word] }
    }

    /// The IPv4 address as the memory of its four bytes in network order, when it is one.
    #[inline(always)]
    pub const fn v4_be(self) -> Option<u32> {
        #[cfg(target_endian = "little")]
        let (be, prefix, want) = (
            (self.words[1] >> 32) as u32,
            self.words[1] as u32,
            0xffff_0000,
        );
        #[cfg(target_endian = "big")]
        let (be, prefix, want) = (
            self.words[1] as u32,
            (self.words[1] >> 32) as u32,
            0x0000_ffff,
        );
        if self.words[0] == 0 && prefix == want {
            Some(be)
        } else {
            None
        }
    }

    /// The unspecified address of the same family.
    #[inline(always)]
    pub const fn unspecified(self) -> Self {
        match self.v4_be() {
            Some(_) => Self::from_v4_be(0),
            None => Self { words: [0, 0] },
        }
    }

    /// Whether a host that connects to the address means itself: loopback, and the unspecified address, which means the same.
    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        match self.v4_be() {
            Some(be) => be == 0 || be.to_ne_bytes()[0] == 127,
            None => self.words[0] == 0 && (self.words[1] == 0 || self.words[1] == 1u64.to_be()),
        }
    }

    /// The address of these 16 bytes in network order.
    #[inline(always)]
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        // SAFETY: both are 16 plain bytes.
        unsafe { core::mem::transmute(octets) }
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    pub const fn octets(self) -> [u8; 16] {
        // SAFETY: both are 16 plain bytes.
        unsafe { core::mem::transmute(self.words) }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => Self::from_octets(v6.octets()),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(v4: Ipv4Addr) -> Self {
        Self::from_v4_be(u32::from_ne_bytes(v4.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(v6: Ipv6Addr) -> Self {
        Self::from_octets(v6.octets())
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        Ipv6Addr::from(addr.octets()).to_canonical()
    }
}

impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// [`LocalAddress::kind`] of a pod on this node.
pub const FROM_POD: u32 = 1;
/// [`LocalAddress::kind`] of an address of the node itself.
pub const FROM_HOST: u32 = 2;
/// Beside [`FROM_POD`]: what is for the pod goes through the queue of the host's side of its veth, where its rate is limited.
pub const QUEUED: u32 = 4;

/// What is behind an address of this node: a pod's veth, or the host itself.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalAddress {
    /// [`FROM_POD`], perhaps with [`QUEUED`], or [`FROM_HOST`].
    pub kind: u32,
    /// Interface index of the host's side of the pod's veth; 0 for the host.
    pub ifindex: u32,
    /// MAC address of the pod's side; zero for the host.
    pub mac: [u8; 6],
    pub pad: [u8; 2],
}
plain!(LocalAddress, 16, { kind: 0, ifindex: 4, mac: 8, pad: 14 });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4_addresses_are_mapped_into_v6_and_back() {
        let v4 = Ipv4Addr::new(10, 96, 0, 10);
        let addr = Addr::from(v4);
        assert_eq!(addr.octets(), v4.to_ipv6_mapped().octets());
        assert_eq!(addr.v4_be(), Some(u32::from_ne_bytes([10, 96, 0, 10])));
        assert_eq!(IpAddr::from(addr), IpAddr::V4(v4));
    }

    #[test]
    fn loopback_is_known_in_both_families() {
        for (text, loopback) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("0.0.0.0", true),
            ("::1", true),
            ("::", true),
            ("10.0.0.127", false),
            ("fe80::1", false),
            ("::2", false),
        ] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Addr::from(ip).is_loopback(), loopback, "{text}");
            let unspecified = IpAddr::from(Addr::from(ip).unspecified());
            assert!(unspecified.is_unspecified() && unspecified.is_ipv4() == ip.is_ipv4());
        }
    }

    #[test]
    fn v6_addresses_are_not_taken_for_v4() {
        for text in ["fd00::1", "::1", "::", "::fffe:10.0.0.1"] {
            let v6: Ipv6Addr = text.parse().unwrap();
            assert_eq!(Addr::from(v6).v4_be(), None, "{text}");
            assert_eq!(IpAddr::from(Addr::from(v6)), IpAddr::V6(v6));
        }
    }
}
