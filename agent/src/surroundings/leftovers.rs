//! Other network plugins and proxies, and what they leave behind: interfaces, configurations, rules.

use std::fs;
use std::path::Path;

use crate::install::CONF_LIST;
use crate::net::nftables::Chain;

/// Interfaces of other network plugins and proxies, by name or its beginning, and whose they are.
const INTERFACES: [(&str, &str); 14] = [
    ("antrea-gw", "Antrea"),
    ("cali", "Calico"),
    ("cilium_", "Cilium"),
    ("cni0", "the bridge plugin"),
    ("cni-podman", "Podman"),
    ("flannel", "Flannel"),
    ("kube-bridge", "kube-router"),
    ("kube-ipvs0", "kube-proxy in IPVS mode"),
    ("lxc", "Cilium"),
    ("nodelocaldns", "NodeLocal DNSCache"),
    ("ovn-k8s", "OVN-Kubernetes"),
    ("tunl0", "Calico or kube-router"),
    ("vxlan.calico", "Calico"),
    ("weave", "Weave Net"),
];

/// Whether an interface is another network plugin's or proxy's.
pub fn is_foreign(name: &str) -> bool {
    INTERFACES
        .iter()
        .any(|(beginning, _)| name.starts_with(beginning))
}

/// What interfaces of others are there, in words.
pub fn foreign_interfaces<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for name in names {
        // The longest beginning says most.
        let owner = INTERFACES
            .iter()
            .filter(|(beginning, _)| name.starts_with(beginning))
            .max_by_key(|(beginning, _)| beginning.len());
        if let Some((_, owner)) = owner {
            let note = format!(
                "interface {name} is of {owner}: what it left behind may lead packets astray"
            );
            // Many pods of one plugin are one finding.
            let of_owner = format!("is of {owner}:");
            if !found.iter().any(|one| one.contains(&of_owner)) {
                found.push(note);
            }
        }
    }
    found
}

/// Network configurations that runtimes take before ours, since they take the first by name. A folder that cannot be read has none.
pub fn earlier_configurations(dir: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            let is_configuration = [".conf", ".conflist", ".json"]
                .iter()
                .any(|end| name.ends_with(end));
            is_configuration && name.as_str() < CONF_LIST
        })
        .map(|name| {
            format!(
                "{} comes before {CONF_LIST}: runtimes give pods that network instead",
                dir.join(name).display()
            )
        })
        .collect();
    found.sort();
    found
}

/// Chains and tables of others, by their name or its beginning, whose they are, and how they go.
const RULES: [(&str, &str, &str); 7] = [
    (
        "KUBE-SERVICES",
        "kube-proxy",
        "Services are Keelway's now; `kube-proxy --cleanup` removes them, once kube-proxy has ended",
    ),
    (
        "kube-proxy",
        "kube-proxy",
        "Services are Keelway's now; `kube-proxy --cleanup` removes them, once kube-proxy has ended",
    ),
    (
        "KUBE-ROUTER",
        "kube-router",
        "`kube-router --cleanup-config` removes them",
    ),
    (
        "cali",
        "Calico",
        "restart the node, or remove them by its documentation",
    ),
    (
        "CILIUM",
        "Cilium",
        "`cilium-dbg post-uninstall-cleanup` removes them",
    ),
    (
        "FLANNEL",
        "Flannel",
        "restart the node, or remove them by its documentation",
    ),
    (
        "CNI-HOSTPORT",
        "the portmap plugin",
        "they go with the pods that it served",
    ),
];

/// Whose rules are in the packet filter, in words: those of proxies and network plugins that work no more, or work against this one.
pub fn foreign_rules(chains: &[Chain]) -> Vec<String> {
    let mut found = Vec::new();
    for (beginning, owner, advice) in RULES {
        let of_owner = chains
            .iter()
            .find(|chain| chain.name.starts_with(beginning) || chain.table == beginning);
        let of_owner = of_owner.map(|chain| {
            format!(
                "rules of {owner} are in the packet filter (table {} {}): {advice}",
                chain.family.name(),
                chain.table
            )
        });
        let known = format!("rules of {owner} ");
        if let Some(note) = of_owner
            && !found.iter().any(|one: &String| one.starts_with(&known))
        {
            found.push(note);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::nftables::Family;

    #[test]
    fn what_others_left_is_named_once_each_and_ours_is_not() {
        let names = [
            "lo",
            "eth0",
            "keelway-svc",
            "kw0123456789ab",
            "cali12",
            "cali13",
            "vxlan.calico",
            "flannel.1",
        ];
        let found = foreign_interfaces(names);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("cali12 is of Calico") && found[1].contains("Flannel"));
    }

    #[test]
    fn configurations_that_come_first_are_named() {
        let dir = tempfile::tempdir().expect("a folder");
        for name in [
            "00-multus.conf",
            "10-flannel.conflist",
            "04-notes.txt",
            CONF_LIST,
        ] {
            fs::write(dir.path().join(name), "").expect("a file");
        }
        let found = earlier_configurations(dir.path());
        assert!(
            found.len() == 1 && found[0].contains("00-multus.conf comes before"),
            "{found:?}"
        );
        assert!(earlier_configurations(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn rules_of_others_are_named_once_for_each_owner() {
        let chain = |table: &str, name: &str| Chain {
            family: Family::IPV4,
            table: table.into(),
            name: name.into(),
            forwards: false,
            drops: false,
        };
        let found = foreign_rules(&[
            chain("nat", "KUBE-SERVICES"),
            chain("nat", "KUBE-SVC-1"),
            chain("kube-proxy", "services"),
            // The kubelet's own, which do no harm.
            chain("mangle", "KUBE-KUBELET-CANARY"),
            chain("filter", "cali-FORWARD"),
        ]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("kube-proxy") && found[0].contains("table ip nat"));
        assert!(found[1].contains("Calico"));
    }
}
