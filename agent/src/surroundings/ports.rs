//! Ports that the node gives to others' flows, and that its own connections take too.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use dataplane_abi::limits::{FLOW_PORT_FIRST, FLOW_PORTS};

const OURS: RangeInclusive<u16> = FLOW_PORT_FIRST..=FLOW_PORT_FIRST + FLOW_PORTS - 1;

/// What is to be done when the kernel gives the node's own connections ports of those for others' flows: a connection of the node and a flow
/// of somebody else's, from one port to one backend, would be taken for each other.
pub fn own_connections(proc: &Path) -> Option<String> {
    let setting = |name: &str| fs::read_to_string(proc.join("sys/net/ipv4").join(name)).ok();
    let own = setting("ip_local_port_range")?;
    let reserved = setting("ip_local_reserved_ports").unwrap_or_default();
    let (first, last) = shared(&own, &reserved)?;
    let (ours, end) = (OURS.start(), OURS.end());
    Some(format!(
        "the node's own connections may have ports {first} to {last} (net.ipv4.ip_local_port_range), which others' flows that leave as the node \
         have too: of one port and one destination, they would be taken for each other. Set net.ipv4.ip_local_port_range to begin above {end}, or add {ours}-{end} \
         to net.ipv4.ip_local_reserved_ports"
    ))
}

/// The first and the last port of ours that the kernel takes for connections, of a range `own` (two numbers), but for those that are
/// `reserved` (numbers and ranges, with commas between them).
fn shared(own: &str, reserved: &str) -> Option<(u16, u16)> {
    let mut bounds = own.split_ascii_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last))) = (bounds.next(), bounds.next()) else {
        return None;
    };
    let ranges: Vec<RangeInclusive<u16>> = reserved.trim().split(',').filter_map(range).collect();
    let is_free = |port: &u16| !ranges.iter().any(|range| range.contains(port));
    let mut both = (first.max(*OURS.start())..=last.min(*OURS.end())).filter(is_free);
    let least = both.next()?;
    Some((least, both.next_back().unwrap_or(least)))
}

fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_the_kernel_gives_to_connections_are_named_but_for_reserved_ones() {
        for (own, reserved, expected) in [
            ("32768\t60999\n", "\n", None),
            ("24576 60999", "", None),
            ("24575 60999", "", Some((24575, 24575))),
            ("1024\t65535\n", "\n", Some((8192, 24575))),
            ("1024 10000", "", Some((8192, 10000))),
            ("1024 65535", "8192-24575\n", None),
            (
                "1024 65535",
                "80,8192-9000,9001-20000",
                Some((20001, 24575)),
            ),
            ("1024 65535", "24575,10000", Some((8192, 24574))),
            ("", "", None),
            ("some thing", "else-,-", None),
        ] {
            assert_eq!(shared(own, reserved), expected, "{own:?} {reserved:?}");
        }
    }

    #[test]
    fn what_is_said_names_the_settings_and_a_kernel_without_them_says_nothing() {
        let proc = tempfile::tempdir().expect("a folder");
        assert_eq!(own_connections(proc.path()), None);
        let folder = proc.path().join("sys/net/ipv4");
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("ip_local_port_range"), "1024\t65535\n").expect("a file");
        let said = own_connections(proc.path()).expect("a note");
        for part in [
            "8192 to 24575",
            "above 24575",
            "8192-24575 to net.ipv4.ip_local_reserved_ports",
        ] {
            assert!(said.contains(part), "{said}");
        }
        fs::write(folder.join("ip_local_reserved_ports"), "8192-24575\n").expect("a file");
        assert_eq!(own_connections(proc.path()), None);
    }
}
