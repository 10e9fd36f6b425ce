//! Packet filters that stand between pods and the rest of the world.
//!
//! What pods of one node send each other passes by them; what they send elsewhere is forwarded by the kernel, and a chain may drop that:
//! Docker and ufw set the policy of FORWARD to that. Rules in other chains cannot help, so ours go into the very chain.

use std::fs;
use std::path::Path;

use crate::net::nftables::{Chain, OurRule, Side};

/// How the names of pods' interfaces begin.
pub const POD_INTERFACES: &str = "kw";

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

/// The old iptables, whose tables nft does not show. What is in them is not read.
pub fn legacy(proc: &Path) -> Option<String> {
    let names = fs::read_to_string(proc.join("self/net/ip_tables_names")).ok()?;
    names.lines().any(|name| name == "filter").then(|| {
        "iptables-legacy has rules: if the policy of FORWARD is DROP there, let pods pass with `iptables-legacy -I FORWARD -i kw+ -j ACCEPT` \
         and the same with -o"
            .into()
    })
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
    fn the_old_iptables_is_named_where_its_tables_are() {
        let proc = tempfile::tempdir().expect("a folder");
        assert_eq!(legacy(proc.path()), None);
        fs::create_dir_all(proc.path().join("self/net")).expect("a folder");
        fs::write(proc.path().join("self/net/ip_tables_names"), "nat\n").expect("a file");
        assert_eq!(legacy(proc.path()), None);
        fs::write(
            proc.path().join("self/net/ip_tables_names"),
            "nat\nfilter\n",
        )
        .expect("a file");
        assert!(legacy(proc.path()).is_some_and(|note| note.contains("-i kw+")));
    }
}
