//! Three nodes with agents, and the network between them: of the kinds that users have.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::agents::{AgentNode, ClusterFile, numbered_node};
use crate::sandbox::{Network, Sandbox, ip};

/// What is between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fabric {
    /// A switch: all nodes are on one link.
    OneLink,
    /// Two switches and a router that knows nothing of pods: the third node is on the other link.
    TwoLinks,
    /// A router alone: every node is on a link of its own.
    Routed,
    /// One subnet in which each node's packets pass a router that drops what is from or to no node, as clouds do. IPv4 alone.
    Cloud,
}

/// The nodes and what is between them. Goes with the value.
pub struct Nodes {
    pub cluster: ClusterFile,
    pub nodes: [AgentNode; 3],
    kind: Fabric,
    fabric: Network,
}

impl Fabric {
    fn link(self, number: u8) -> u8 {
        match self {
            Fabric::OneLink | Fabric::Cloud => 0,
            Fabric::TwoLinks => number / 3,
            Fabric::Routed => number,
        }
    }
}

/// Lays the network, with nothing running on the nodes but an echo server each.
pub fn three_nodes(sandbox: &Sandbox, dir: &Path, fabric: Fabric, flags: &[&str]) -> Result<Nodes> {
    let between = Network::host()?;
    let dual = fabric != Fabric::Cloud;
    between.run(|| -> Result<()> {
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{key}"), "1").context(key)?;
        }
        if fabric != Fabric::Cloud {
            for link in 0..4 {
                ip(&format!("link add link{link} type bridge"))?;
                ip(&format!("addr add 198.18.{link}.254/24 dev link{link}"))?;
                ip(&format!(
                    "addr add fd00:18:{link}::fe/64 dev link{link} nodad"
                ))?;
                ip(&format!("link set link{link} up"))?;
            }
        }
        Ok(())
    })?;
    let mut cluster = ClusterFile {
        path: dir.join("cluster.json"),
        nodes: Vec::new(),
    };
    let mut nodes = Vec::new();
    for number in 1..=3_u8 {
        let link = fabric.link(number);
        let host = Network::host()?;
        ip(&format!(
            "link add kw-u{number} type veth peer name kw-f{number}"
        ))?;
        host.take(&format!("kw-u{number}"))?;
        between.take(&format!("kw-f{number}"))?;
        let address = Ipv4Addr::new(198, 18, link, number);
        between.run(|| -> Result<()> {
            if fabric == Fabric::Cloud {
                let conf = format!("/proc/sys/net/ipv4/conf/kw-f{number}/proxy_arp");
                std::fs::write(&conf, "1").context(conf)?;
                let delay = format!("/proc/sys/net/ipv4/neigh/kw-f{number}/proxy_delay");
                std::fs::write(&delay, "0").context(delay)?;
                ip(&format!("link set kw-f{number} up"))?;
                ip(&format!("route add {address}/32 dev kw-f{number}"))
            } else {
                ip(&format!("link set kw-f{number} master link{link} up"))
            }
        })?;
        host.run(|| -> Result<()> {
            // As strict as hosts are.
            for conf in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv4/conf/{conf}/rp_filter");
                std::fs::write(&path, "1").context(path)?;
            }
            ip(&format!("link set kw-u{number} name eth0"))?;
            ip(&format!("addr add {address}/24 dev eth0"))?;
            if dual {
                ip(&format!(
                    "addr add fd00:18:{link}::{number}/64 dev eth0 nodad"
                ))?;
            }
            ip("link set eth0 up")?;
            if dual {
                ip(&format!("route add default via 198.18.{link}.254"))?;
                ip(&format!("-6 route add default via fd00:18:{link}::fe"))?;
            }
            Ok(())
        })?;
        let second = dual.then(|| format!("fd00:18:{link}::{number}").parse());
        let (name, object) = numbered_node(number, address, second.transpose()?);
        cluster.nodes.push(object);
        nodes.push(AgentNode::new(
            sandbox, dir, &cluster, name, host, address, flags,
        )?);
    }
    let nodes = nodes
        .try_into()
        .map_err(|_count| anyhow::anyhow!("three nodes"))?;
    Ok(Nodes {
        cluster,
        nodes,
        kind: fabric,
        fabric: between,
    })
}

impl Nodes {
    /// Has the switches drop pods' packets from now on, in both families, as clouds may begin to; or carry them again.
    pub fn refuse_pods(&self, refused: bool) -> Result<()> {
        let rules = if refused {
            "table bridge cloud { chain forward { type filter hook forward priority 0; \
             ip saddr 10.244.0.0/16 drop; ip6 saddr fd00:10:244::/48 drop; }; }"
        } else {
            "delete table bridge cloud"
        };
        let output = self
            .fabric
            .run(|| Command::new("nft").arg(rules).output())
            .context("nft")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft: {said}");
        Ok(())
    }

    /// Cuts a node (1 to 3) off from the others, or lets it back.
    pub fn cut_off(&self, number: u8, off: bool) -> Result<()> {
        let state = if off { "down" } else { "up" };
        self.fabric.run(|| -> Result<()> {
            ip(&format!("link set kw-f{number} {state}"))?;
            // It went with the link.
            if self.kind == Fabric::Cloud && !off {
                ip(&format!("route add 198.18.0.{number}/32 dev kw-f{number}"))?;
            }
            Ok(())
        })
    }
}
