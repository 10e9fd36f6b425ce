//! A member of an etcd as a service of a node, and how a control plane reaches the members.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::node::ServiceSpec;

/// The name of the service, and of the program (Debian: etcd-server).
pub const SERVICE: &str = "etcd";
/// Ports of members, for clients and for each other.
pub const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;
/// Where a node sees its credentials, and the files of etcd there.
const FOLDER: &str = "/etc/keelway";
/// Where a node remembers who is a member.
const MEMBERS_FILE: &str = "var/lib/keelway/etcd-members";
pub const CA: &str = "etcd-ca.crt";
pub const CLIENT: [&str; 2] = ["etcd-client.crt", "etcd-client.key"];
pub const MEMBER: [&str; 2] = ["etcd.crt", "etcd.key"];

/// Whether a member is of those that begin the etcd, or comes to one that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    Founder,
    Latecomer,
}

/// A member by its name and its node's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub address: IpAddr,
}

/// Where clients reach the member at an address.
pub fn client_url(address: IpAddr) -> String {
    format!("https://{}", SocketAddr::new(address, CLIENT_PORT))
}

/// Where other members reach it.
pub fn peer_url(address: IpAddr) -> String {
    format!("https://{}", SocketAddr::new(address, PEER_PORT))
}

impl Member {
    /// The service that is this member. `cluster` has all members at its first start, itself included, as NAME=URL of peers.
    pub fn service(&self, cluster: &[String], arrival: Arrival) -> ServiceSpec {
        let (client, peer) = (client_url(self.address), peer_url(self.address));
        let state = match arrival {
            Arrival::Founder => "new",
            Arrival::Latecomer => "existing",
        };
        let file = |name: &str| format!("{FOLDER}/{name}");
        let [certificate, key] = MEMBER.map(file);
        let authority = file(CA);
        let flags: [(&str, &str); 14] = [
            ("--name", &self.name),
            ("--data-dir", "/var/lib/etcd"),
            ("--listen-client-urls", &client),
            ("--advertise-client-urls", &client),
            ("--listen-peer-urls", &peer),
            ("--initial-advertise-peer-urls", &peer),
            ("--initial-cluster", &cluster.join(",")),
            ("--initial-cluster-state", state),
            ("--cert-file", &certificate),
            ("--key-file", &key),
            ("--trusted-ca-file", &authority),
            ("--peer-cert-file", &certificate),
            ("--peer-key-file", &key),
            ("--peer-trusted-ca-file", &authority),
        ];
        let pairs = flags.iter().flat_map(|(flag, value)| [*flag, *value]);
        let alone = ["--client-cert-auth", "--peer-client-cert-auth"];
        let words = [SERVICE].into_iter().chain(pairs).chain(alone);
        ServiceSpec {
            name: SERVICE.to_owned(),
            argv: words.map(str::to_owned).collect(),
            env: BTreeMap::new(),
            after: Vec::new(),
            notifies: true,
            listens: false,
            outside: false,
        }
    }

    /// This member in the list that members begin with.
    pub fn as_initial(&self) -> String {
        format!("{}={}", self.name, peer_url(self.address))
    }
}

/// The flags by which a control plane on a node of ours finds members, and is let in.
pub fn own_store_flags(urls: &[String]) -> Vec<String> {
    let mut flags = store_flags(Path::new(FOLDER), urls);
    // Members come and go; a control plane that starts while its own is down asks the others.
    flags.extend(["--etcd-members-file".to_owned(), format!("/{MEMBERS_FILE}")]);
    flags
}

/// The members that a control plane knew last, an address a line.
pub fn remembered(node: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(node.join(MEMBERS_FILE));
    let text = text.unwrap_or_default();
    let addresses = text.lines().filter(|line| line.starts_with("https://"));
    addresses.map(str::to_owned).collect()
}

/// The same for programs that see the credentials in another folder.
pub fn store_flags(folder: &Path, urls: &[String]) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    let [certificate, key] = CLIENT.map(file);
    let flags = [
        ("--store", format!("etcd:{}", urls.join(","))),
        ("--etcd-cafile", file(CA)),
        ("--etcd-certfile", certificate),
        ("--etcd-keyfile", key),
    ];
    let words = flags.map(|(flag, value)| [flag.to_owned(), value]);
    words.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_of_ipv6_is_reached_at_its_address_in_brackets() {
        let member = Member {
            name: "a".to_owned(),
            address: "fd00::1".parse().expect("an address"),
        };
        assert_eq!(member.as_initial(), "a=https://[fd00::1]:2380");
        let argv = member
            .service(&[member.as_initial()], Arrival::Latecomer)
            .argv;
        let value = |flag| {
            let at = argv.iter().position(|word| word == flag);
            argv[at.expect("the flag") + 1].as_str()
        };
        assert_eq!(value("--listen-client-urls"), "https://[fd00::1]:2379");
        assert_eq!(value("--initial-cluster-state"), "existing");
        let store = own_store_flags(&[client_url(member.address)]);
        assert_eq!(store[1], "etcd:https://[fd00::1]:2379");
        assert!(store.contains(&"/var/lib/keelway/etcd-members".to_owned()));
    }
}
