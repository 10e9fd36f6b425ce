//! The packet filter of the old iptables (`iptables-legacy`), whose tables nftables does not show: what becomes of forwarded packets that
//! no rule of it is for. It is read only: the kernel can but replace such a table as a whole, and what somebody else adds meanwhile
//! would be lost.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsFd as _;

use super::sys::socket_option;

/// Of linux/netfilter_ipv4/ip_tables.h and its sister for IPv6, which have the same numbers.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
const NAME_LEN: usize = 32;
const INFO_LEN: usize = 84;
const HOOK_ENTRY: usize = 36;
const UNDERFLOW: usize = 56;
const SIZE: usize = 80;
/// Entries lie behind name and size, aligned for their counters.
const ENTRIES: usize = 40;
/// The number of the hook FORWARD.
const FORWARD: usize = 2;
/// A target's name and size, before its verdict.
const TARGET_HEADER: usize = 32;
/// Verdicts of a standard target: -NF_DROP - 1, -NF_ACCEPT - 1.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
const INTERFACE_LEN: usize = 16;
/// More than any table: some have tens of thousands of rules.
const TABLE_BYTES_MAX: u32 = 64 << 20;

/// Where the parts of an entry are.
struct Layout {
    family: &'static str,
    level: i32,
    /// Names of the interfaces that it is for; each is followed by the other, then by their masks.
    interfaces: usize,
    /// Offsets of its target and of the next entry.
    offsets: usize,
}

const V4: Layout = Layout {
    family: "IPv4",
    level: libc::SOL_IP,
    interfaces: 16,
    offsets: 88,
};
const V6: Layout = Layout {
    family: "IPv6",
    level: libc::SOL_IPV6,
    interfaces: 64,
    offsets: 140,
};

/// What the old filter does with what is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// What no rule is for is dropped.
    pub drops: bool,
    /// Rules accept all from and to interfaces whose names begin like pods'.
    pub lets_pods_pass: bool,
}

/// The old filter of IPv4, and of IPv6: to be asked for where there is a table, since asking makes one.
pub fn forward(v6: bool, pods: &str) -> io::Result<Option<Forward>> {
    let (layout, socket) = if v6 {
        (V6, UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?)
    } else {
        (V4, UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?)
    };
    let mut info = vec![0; INFO_LEN];
    named(&mut info);
    socket_option(socket.as_fd(), layout.level, GET_INFO, &mut info)?;
    let size = word(&info, SIZE).filter(|size| *size <= TABLE_BYTES_MAX);
    let size = size.ok_or_else(|| malformed(&layout))?;
    let mut table = vec![0; ENTRIES + size as usize];
    named(&mut table);
    table[NAME_LEN..NAME_LEN + 4].copy_from_slice(&size.to_ne_bytes());
    // When rules changed in between the kernel says so (EAGAIN), and the next look sees them.
    socket_option(socket.as_fd(), layout.level, GET_ENTRIES, &mut table)?;
    let entries = table.get(ENTRIES..).unwrap_or_default();
    Ok(judge(&info, entries, &layout, pods))
}

fn named(bytes: &mut [u8]) {
    bytes[..6].copy_from_slice(b"filter");
}

fn malformed(layout: &Layout) -> io::Error {
    let why = format!("the kernel's {} filter table cannot be read", layout.family);
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(four.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    let two = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(two.try_into().ok()?).into())
}

/// What the table does, by its description and its entries; None when they contradict each other.
fn judge(info: &[u8], entries: &[u8], layout: &Layout, pods: &str) -> Option<Forward> {
    let begin = word(info, HOOK_ENTRY + 4 * FORWARD)? as usize;
    let policy = word(info, UNDERFLOW + 4 * FORWARD)? as usize;
    let verdict = |at: usize| {
        let target = at.checked_add(half(entries, at.checked_add(layout.offsets)?)?)?;
        // A standard target has no name; what another one does is not known here.
        let name = *entries.get(target.checked_add(2)?)?;
        let verdict = word(entries, target.checked_add(TARGET_HEADER)?)?;
        (name == 0).then_some(verdict.cast_signed())
    };
    let (mut from, mut to) = (false, false);
    let mut at = begin;
    while at < policy {
        if verdict(at) == Some(ACCEPT) {
            let is_for = |second: usize| {
                let names = at + layout.interfaces + second * INTERFACE_LEN;
                begins_with(entries, names, pods)
            };
            from |= is_for(0);
            to |= is_for(1);
        }
        let length = half(entries, at.checked_add(layout.offsets + 2)?)?;
        if length == 0 {
            return None;
        }
        at = at.checked_add(length)?;
    }
    Some(Forward {
        drops: verdict(policy)? == DROP,
        lets_pods_pass: from && to,
    })
}

/// Whether the interface named there is any that begins like this: its mask covers the letters, and not the end.
fn begins_with(entries: &[u8], at: usize, beginning: &str) -> bool {
    let part = |at: usize| entries.get(at..at + INTERFACE_LEN);
    let (Some(name), Some(mask)) = (part(at), part(at + 2 * INTERFACE_LEN)) else {
        return false;
    };
    let covered = mask.iter().take_while(|byte| **byte == 0xff).count();
    // A mask that covers nothing is for every interface, and a shorter beginning covers ours.
    covered > 0 && covered <= beginning.len() && name[..covered] == beginning.as_bytes()[..covered]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry for interfaces, whose standard target has this verdict.
    fn entry(layout: &Layout, from: &str, to: &str, verdict: i32) -> Vec<u8> {
        let target = layout.offsets + 28;
        let length = target + TARGET_HEADER + 8;
        let mut bytes = vec![0; length];
        for (name, at) in [(from, 0), (to, INTERFACE_LEN)] {
            let at = layout.interfaces + at;
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
            let mask = at + 2 * INTERFACE_LEN;
            bytes[mask..mask + name.len()].fill(0xff);
        }
        let offsets = [target as u16, length as u16];
        for (n, offset) in offsets.iter().enumerate() {
            let at = layout.offsets + 2 * n;
            bytes[at..at + 2].copy_from_slice(&offset.to_ne_bytes());
        }
        let at = target + TARGET_HEADER;
        bytes[at..at + 4].copy_from_slice(&verdict.to_ne_bytes());
        bytes
    }

    /// A table whose chain FORWARD has these rules, and the policy of the last.
    fn table(layout: &Layout, rules: &[(&str, &str, i32)]) -> (Vec<u8>, Vec<u8>) {
        let mut entries = entry(layout, "", "", ACCEPT);
        let begin = entries.len() as u32;
        let mut policy = begin;
        for (from, to, verdict) in rules {
            policy = entries.len() as u32;
            entries.extend(entry(layout, from, to, *verdict));
        }
        let mut info = vec![0; INFO_LEN];
        for (at, offset) in [(HOOK_ENTRY, begin), (UNDERFLOW, policy)] {
            let at = at + 4 * FORWARD;
            info[at..at + 4].copy_from_slice(&offset.to_ne_bytes());
        }
        (info, entries)
    }

    #[test]
    fn policies_and_rules_for_pods_are_read() {
        for layout in [V4, V6] {
            for (rules, drops, lets_pods_pass) in [
                (&[("", "", ACCEPT)][..], false, false),
                (&[("", "", DROP)], true, false),
                (&[("kw", "", ACCEPT), ("", "", DROP)], true, false),
                (
                    &[("kw", "", ACCEPT), ("", "kw", ACCEPT), ("", "", DROP)],
                    true,
                    true,
                ),
                (
                    &[("kw", "", DROP), ("", "kw", ACCEPT), ("", "", DROP)],
                    true,
                    false,
                ),
                (
                    &[
                        ("docker0", "", ACCEPT),
                        ("", "kwx1", ACCEPT),
                        ("", "", DROP),
                    ],
                    true,
                    false,
                ),
            ] {
                let (info, entries) = table(&layout, rules);
                let found = judge(&info, &entries, &layout, "kw");
                let expected = Forward {
                    drops,
                    lets_pods_pass,
                };
                assert_eq!(found, Some(expected), "{} {rules:?}", layout.family);
            }
        }
    }

    #[test]
    fn tables_that_are_cut_off_or_turn_in_circles_are_none() {
        let (info, entries) = table(&V4, &[("kw", "", ACCEPT), ("", "", DROP)]);
        for length in 0..entries.len() {
            // Nothing is read beyond the end; what is left may still tell.
            let _ = judge(&info, &entries[..length], &V4, "kw");
        }
        for length in 0..INFO_LEN {
            let _ = judge(&info[..length], &entries, &V4, "kw");
        }
        let mut stuck = entries.clone();
        let first = word(&info, HOOK_ENTRY + 4 * FORWARD).expect("there") as usize;
        stuck[first + V4.offsets + 2..first + V4.offsets + 4].fill(0);
        assert_eq!(judge(&info, &stuck, &V4, "kw"), None);
    }
}
