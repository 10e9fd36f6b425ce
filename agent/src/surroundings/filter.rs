//! Packet filters that stand between pods and the rest of the world.
//!
//! What pods of one node send each other passes by them; what they send elsewhere is forwarded by the kernel, and a chain may drop that:
//! Docker and ufw set the policy of FORWARD to that. Rules in other chains cannot help, so ours go into the very chain.

use std::fs;
use std::io;
use std::path::Path;

use crate::addresses::HOST_INTERFACE_PREFIX;
use crate::net::iptables;
use crate::net::nftables::{Chain, OurRule, Side};

/// Rules that a chain lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening<'a> {
    pub chain: &'a Chain,
    pub sides: Vec<Side>,
}

/// The chains that would drop what pods send or get, and have not been opened.
pub fn plan_openings<'a>(chains: &'a [Chain], ours: &[OurRule]) -> Vec<Opening<'a>> {
    let closed = chains.iter().filter(|chain| chain.forwards && chain.drops);
    closed
        .filter_map(|chain| {
            let there = |side: &Side| {
                ours.iter().any(|rule| {
                    rule.family == chain.family
                        && rule.table == chain.table
                        && rule.chain == chain.name
                        && rule.side == *side
                })
            };
            let sides: Vec<Side> = [Side::From, Side::To]
                .into_iter()
                .filter(|side| !there(side))
                .collect();
            (!sides.is_empty()).then_some(Opening { chain, sides })
        })
        .collect()
}

/// Says which chains have been opened.
pub fn notes(chains: &[Chain]) -> Vec<String> {
    chains
        .iter()
        .filter(|chain| chain.forwards && chain.drops)
        .map(|chain| {
            format!(
                "the policy of chain {} (table {} {}) is drop: rules of ours, commented \"keelway\", let pods pass",
                chain.name,
                chain.family.name(),
                chain.table
            )
        })
        .collect()
}

/// firewalld refuses by rules, not by policy, and makes its chains anew when it pleases: it has to be told.
pub fn firewalld(chains: &[Chain]) -> Option<String> {
    let there = chains.iter().any(|chain| chain.table == "firewalld");
    there.then(|| {
        "firewalld filters what is forwarded: let pods pass with `firewall-cmd --permanent --zone=trusted --add-source=RANGE` for each range \
         of pods, open UDP 4789 and 6107 between nodes, then `firewall-cmd --reload`"
            .into()
    })
}

/// The old iptables, whose tables nft does not show.
pub fn legacy(proc: &Path) -> Vec<String> {
    let families = [
        ("iptables", "ip_tables_names", false),
        ("ip6tables", "ip6_tables_names", true),
    ];
    let note = |(program, names, v6): (&str, &str, bool)| {
        // Looking into a table makes it, and with it another thing that packets pass.
        let names = fs::read_to_string(proc.join("self/net").join(names)).ok()?;
        if !names.lines().any(|name| name == "filter") {
            return None;
        }
        legacy_note(program, iptables::forward(v6, HOST_INTERFACE_PREFIX))
    };
    families.into_iter().filter_map(note).collect()
}

fn legacy_note(program: &str, found: io::Result<Option<iptables::Forward>>) -> Option<String> {
    let advice = format!(
        "let pods pass with `{program}-legacy -I FORWARD -i {HOST_INTERFACE_PREFIX}+ -j ACCEPT` and the same with -o"
    );
    match found {
        Ok(Some(forward)) if !forward.drops || forward.lets_pods_pass => None,
        Ok(Some(_)) => Some(format!(
            "the policy of FORWARD is DROP in {program}-legacy, which drops what pods send elsewhere: {advice}"
        )),
        Ok(None) => Some(format!(
            "{program}-legacy has rules that cannot be read: if its policy of FORWARD is DROP, {advice}"
        )),
        Err(error) => Some(format!(
            "{program}-legacy has rules that cannot be read ({error}): if its policy of FORWARD is DROP, {advice}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::nftables::Family;

    fn chain(name: &str, forwards: bool, drops: bool) -> Chain {
        Chain {
            family: Family::IPV4,
            table: "filter".into(),
            name: name.into(),
            forwards,
            drops,
        }
    }

    #[test]
    fn chains_are_opened_that_drop_what_is_forwarded() {
        let chains = [
            chain("INPUT", false, true),
            chain("FORWARD", true, true),
            chain("other", true, false),
        ];
        let openings = plan_openings(&chains, &[]);
        assert_eq!(openings.len(), 1);
        assert_eq!(openings[0].chain.name, "FORWARD");
        assert_eq!(openings[0].sides, [Side::From, Side::To]);
        assert_eq!(notes(&chains).len(), 1);
        assert!(firewalld(&chains).is_none());
    }

    #[test]
    fn the_old_iptables_is_named_where_it_drops_what_pods_send() {
        let proc = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(proc.path().join("self/net")).expect("a folder");
        fs::write(proc.path().join("self/net/ip_tables_names"), "nat\n").expect("a file");
        assert_eq!(legacy(proc.path()), Vec::<String>::new());
        let note = |drops, lets_pods_pass| {
            let found = iptables::Forward {
                drops,
                lets_pods_pass,
            };
            legacy_note("ip6tables", Ok(Some(found)))
        };
        assert_eq!(note(false, false), None);
        assert_eq!(note(true, true), None);
        let said = note(true, false).expect("a note");
        assert!(
            said.contains("ip6tables-legacy -I FORWARD -i kw+"),
            "{said}"
        );
        let unread = legacy_note("iptables", Err(io::ErrorKind::PermissionDenied.into()));
        assert!(unread.is_some_and(|note| note.contains("cannot be read")));
    }
}
