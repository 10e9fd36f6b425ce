//! iptables and nftables rules with the structure of kube-proxy's own, for as many Services as are asked for.
//!
//! What a packet passes is what kube-proxy 1.36 makes it pass: in iptables mode one list of Services that is walked from the top
//! (the measured ones stand in its middle), a chain per Service and one per endpoint; in nftables mode a verdict map from address,
//! protocol and port to the Service's chain. The bench makes them by itself because the real kube-proxy needs a cluster and minutes;
//! `--kube-proxy` measures that one too.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use keelway_tests::sandbox::Network;

use super::cluster::{POD_RANGE, Port, Service};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    Iptables,
    Nftables,
}

impl Rules {
    pub const ALL: [Rules; 2] = [Rules::Iptables, Rules::Nftables];

    pub const fn name(self) -> &'static str {
        match self {
            Rules::Iptables => "iptables",
            Rules::Nftables => "nftables",
        }
    }

    /// The program that loads them, if the machine has it.
    pub fn loader(self) -> Option<Command> {
        let programs: &[&[&str]] = match self {
            Rules::Iptables => &[&["iptables-restore", "--version"]],
            Rules::Nftables => &[&["nft", "--version"]],
        };
        programs
            .iter()
            .find(|words| {
                let mut probe = Command::new(words[0]);
                probe.args(&words[1..]).stdout(Stdio::null());
                probe.stderr(Stdio::null());
                probe.status().is_ok_and(|status| status.success())
            })
            .map(|words| {
                let mut command = Command::new(words[0]);
                if self == Rules::Nftables {
                    command.args(["-f", "-"]);
                }
                command
            })
    }

    /// Replaces all rules of a namespace.
    pub fn load(self, host: &Network, services: &[Service]) -> Result<()> {
        let text = match self {
            Rules::Iptables => iptables(services),
            Rules::Nftables => nftables(services),
        };
        let mut command = self
            .loader()
            .with_context(|| format!("{} cannot be loaded", self.name()))?;
        command.stdin(Stdio::piped()).stderr(Stdio::piped());
        command.stdout(Stdio::null());
        let mut child = host
            .run(|| command.spawn())
            .with_context(|| format!("starting {command:?}"))?;
        let mut input = child.stdin.take().context("no standard input")?;
        // A program that fails closes its end; what it says is the better error.
        let fed = input.write_all(text.as_bytes());
        drop(input);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{command:?}: {}",
            said.lines().take(5).collect::<Vec<_>>().join("\n")
        );
        fed.context("handing the rules over")
    }
}

/// All ports of all Services with a name each, the first Services' in the middle.
fn ports(services: &[Service]) -> Vec<(String, &Service, &Port)> {
    let mut all: Vec<_> = services
        .iter()
        .enumerate()
        .flat_map(|(index, service)| {
            let ports = service.ports.iter();
            ports.map(move |port| (format!("{index:08X}{:08X}", port.number), service, port))
        })
        .collect();
    let half = all.len() / 2;
    all.rotate_right(half);
    all
}

fn iptables(services: &[Service]) -> String {
    let (mut chains, mut list, mut rules) = (String::new(), String::new(), String::new());
    for (name, service, port) in ports(services) {
        let (address, number) = (service.address, port.number);
        let protocol = port.protocol.to_lowercase();
        let endpoint = service.endpoint;
        let comment = format!("-m comment --comment \"bench/{address}:p{number} cluster IP\"");
        let to = format!("-d {address}/32 -p {protocol} -m {protocol} --dport {number}");
        let _ = write!(
            chains,
            ":KUBE-SVC-{name} - [0:0]\n:KUBE-SEP-{name} - [0:0]\n"
        );
        let _ = writeln!(list, "-A KUBE-SERVICES {comment} {to} -j KUBE-SVC-{name}");
        let _ = writeln!(
            rules,
            "-A KUBE-SVC-{name} {comment} ! -s {POD_RANGE} {to} -j KUBE-MARK-MASQ"
        );
        let _ = writeln!(
            rules,
            "-A KUBE-SVC-{name} -m comment --comment \"bench/{address}:p{number} -> {endpoint}:{number}\" -j KUBE-SEP-{name}"
        );
        let _ = writeln!(
            rules,
            "-A KUBE-SEP-{name} {comment} -s {endpoint}/32 -j KUBE-MARK-MASQ"
        );
        let _ = writeln!(
            rules,
            "-A KUBE-SEP-{name} {comment} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}:{number}"
        );
        if let Some(node_port) = port.node_port {
            let _ = writeln!(chains, ":KUBE-EXT-{name} - [0:0]");
            let _ = writeln!(
                rules,
                "-A KUBE-NODEPORTS {comment} -p {protocol} -m {protocol} --dport {node_port} -j KUBE-EXT-{name}"
            );
            let _ = writeln!(rules, "-A KUBE-EXT-{name} {comment} -j KUBE-MARK-MASQ");
            let _ = writeln!(rules, "-A KUBE-EXT-{name} -j KUBE-SVC-{name}");
        }
    }
    format!(
        "*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
{chains}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{list}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
{rules}COMMIT
"
    )
}

fn nftables(services: &[Service]) -> String {
    let (mut chains, mut elements) = (String::new(), Vec::new());
    let (mut node_ports, mut addresses) = (Vec::new(), BTreeSet::new());
    for (name, service, port) in ports(services) {
        let (address, number) = (service.address, port.number);
        let protocol = port.protocol.to_lowercase();
        let endpoint = service.endpoint;
        let _ = write!(
            chains,
            "chain endpoint-{name} {{
  ip saddr {endpoint} jump mark-for-masquerade
  meta l4proto {protocol} dnat to {endpoint}:{number}
}}
chain service-{name} {{
  ip daddr {address} {protocol} dport {number} ip saddr != {POD_RANGE} jump mark-for-masquerade
  numgen random mod 1 vmap {{ 0 : goto endpoint-{name} }}
}}
"
        );
        elements.push(format!(
            "{address} . {protocol} . {number} : goto service-{name}"
        ));
        addresses.insert(address.to_string());
        if let Some(node_port) = port.node_port {
            let _ = write!(
                chains,
                "chain external-{name} {{\n  jump mark-for-masquerade\n  goto service-{name}\n}}\n"
            );
            node_ports.push(format!("{protocol} . {node_port} : goto external-{name}"));
        }
    }
    let addresses: Vec<String> = addresses.into_iter().collect();
    format!(
        "table ip kube-proxy {{}}
delete table ip kube-proxy
table ip kube-proxy {{
set cluster-ips {{ type ipv4_addr; elements = {{ {addresses} }}; }}
set nodeport-ips {{ type ipv4_addr; elements = {{ {node} }}; }}
map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
chain masquerading {{
  meta mark and 0x4000 == 0 return
  meta mark set meta mark xor 0x4000
  masquerade fully-random
}}
{chains}
map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {elements} }}; }}
map service-nodeports {{ type inet_proto . inet_service : verdict; {node_ports} }}
chain services {{
  ip daddr . meta l4proto . th dport vmap @service-ips
  ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}}
chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
chain cluster-ips-check {{ ip daddr @cluster-ips reject; }}
chain filter-prerouting {{ type filter hook prerouting priority -110; ct state new jump firewall-check; }}
chain filter-input {{ type filter hook input priority -110; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }}
chain filter-forward {{ type filter hook forward priority -110; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }}
chain filter-output {{ type filter hook output priority -90; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }}
chain filter-output-pre-dnat {{ type filter hook output priority -110; ct state new jump firewall-check; }}
chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
chain nat-output {{ type nat hook output priority -100; jump services; }}
chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
",
        addresses = addresses.join(", "),
        node = super::cluster::node_address(1),
        elements = elements.join(",\n"),
        node_ports = if node_ports.is_empty() {
            String::new()
        } else {
            format!("elements = {{ {} }};", node_ports.join(", "))
        },
    )
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::cluster::services;
    use super::*;

    #[test]
    fn measured_services_stand_in_the_middle_of_the_list() {
        let servers = [Ipv4Addr::new(10, 244, 17, 2), Ipv4Addr::new(10, 244, 33, 2)];
        let services = services(101, servers);
        let text = iptables(&services);
        let list: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SERVICES") && line.contains("--dport"))
            .collect();
        assert_eq!(list.len(), 109);
        let at = list
            .iter()
            .position(|line| line.contains("-d 10.96.0.100/32 "))
            .expect("the first Service");
        assert!((50..60).contains(&at), "{at}");
    }

    #[test]
    fn every_service_port_has_an_element_and_two_chains() {
        let servers = [Ipv4Addr::new(10, 244, 17, 2), Ipv4Addr::new(10, 244, 33, 2)];
        let text = nftables(&services(12, servers));
        assert_eq!(text.matches(": goto service-").count(), 20);
        assert_eq!(text.matches("chain endpoint-").count(), 20);
        assert_eq!(text.matches(": goto external-").count(), 10);
    }
}
