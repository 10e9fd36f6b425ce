//! From a pod: names of the cluster, asked for at the cluster DNS's Service, as they are answered at the pod's interface, by the same
//! server in another pod, and by CoreDNS there.
//!
//! One question at a time, client and servers share one CPU: a round trip between two of them says more of the machine than of the path.
//! For many at a time the client has another one.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use keelway_tests::agents::{ClusterFile, Pod, program, two_nodes};
use keelway_tests::lists::{ListServer, services};
use keelway_tests::sandbox::Sandbox;
use serde_json::{Value, json};

use super::findings::{Findings, Place};
use super::load::{Pace, one_at_a_time, run as ask};
use super::workload::{Workload, question, service_name};
use super::{ENDPOINTS, Extent, fill, pin};

/// Who answers, and the Service by which it is asked.
const ASKED: [(&str, Ipv4Addr); 3] = [
    (IN_KERNEL, Ipv4Addr::new(10, 96, 255, 10)),
    (SERVER, Ipv4Addr::new(10, 96, 255, 11)),
    (super::subject::COREDNS, Ipv4Addr::new(10, 96, 255, 12)),
];
pub const IN_KERNEL: &str = "in-kernel";
pub const SERVER: &str = "server";

/// Longest wait for a server to know the cluster.
const PATIENCE: Duration = Duration::from_secs(120);

struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks from a pod; everything is made and taken away here.
pub fn measure(
    count: usize,
    coredns: Option<&Path>,
    extent: &Extent,
    findings: &mut Findings,
) -> Result<()> {
    let sandbox = Sandbox::enter()?;
    let folder = tempfile::tempdir()?;
    let flags = ["--healthz-bind-address", ""];
    let (cluster, [mut node, _other]) = two_nodes(&sandbox, folder.path(), &flags)?;
    write(&cluster, &[], 0)?;
    node.start()?;
    let client = node.wire("client")?;
    let pods = ASKED
        .iter()
        .map(|(name, _)| node.wire(name))
        .collect::<Result<Vec<_>>>()?;
    write(&cluster, &pods, count)?;
    let known = count as u64 + ASKED.len() as u64;
    node.wait("all Services", |report| report["services"] == known)?;
    let mut started = Vec::new();
    // The loopback of a pod is another one: nobody is there.
    let nowhere = ListServer::start()?.kubeconfig(folder.path())?;
    let share = node.socket().with_file_name("cluster").join("watch.sock");
    for ((name, _), pod) in ASKED.iter().zip(&pods) {
        let command = match *name {
            IN_KERNEL => Some(ours(|ours| {
                ours.arg("--agent")
                    .arg(&share)
                    .arg("--kubeconfig")
                    .arg(&nowhere)
            })?),
            // It is told of the cluster by nobody who answers for it.
            SERVER => Some(ours(|ours| {
                ours.args(["--agent", ""])
                    .arg("--snapshot")
                    .arg(&cluster.path)
            })?),
            _ => coredns
                .map(|program| pod.network.run(|| theirs(program, folder.path(), count)))
                .transpose()?,
        };
        if let Some((mut command, api)) = command {
            let child = pod.network.run(|| command.spawn());
            started.push((
                *name,
                Started(child.with_context(|| (*name).to_owned())?),
                api,
            ));
        }
    }
    let servers: Vec<(&'static str, SocketAddr)> = ASKED
        .iter()
        .filter(|(name, _)| started.iter().any(|(known, ..)| known == name))
        .map(|(name, address)| (*name, (*address, 53).into()))
        .collect();
    let last = question(&service_name(count - 2));
    for (name, server) in &servers {
        client.network.run(|| wait(name, *server, &last))?;
    }
    node.wait("answers at pods' interfaces", |report| {
        report["dnsNames"].as_u64() > Some(count as u64 / 2)
    })?;
    // Before it is pinned to one.
    let cpus = thread::available_parallelism()?.get();
    for workload in [Workload::Cluster, Workload::SearchPath] {
        let questions = workload.questions(count);
        for round in 0..extent.rounds {
            let mut order = servers.clone();
            if round % 2 == 1 {
                order.reverse();
            }
            for (subject, server) in order {
                let place = Place {
                    services: count,
                    cpus: 1,
                    subject,
                };
                let (one, many) = client.network.run(|| -> Result<_> {
                    pin(0)?;
                    let one = one_at_a_time(server, &questions, extent.duration)?;
                    pin(cpus - 1)?;
                    let many = ask(server, &questions, Pace::Closed(32), extent.duration)?;
                    Ok((one, many))
                })?;
                findings.pod(place, workload.name(), &one, &many);
            }
        }
    }
    Ok(())
}

/// Ours, which needs no API server.
fn ours(more: impl FnOnce(&mut Command) -> &mut Command) -> Result<(Command, Option<ListServer>)> {
    let mut command = on_one_cpu(&program("keelway-dns")?);
    command
        .args(["serve", "--listen", "0.0.0.0:53", "--threads", "1"])
        .args(["--health", "127.0.0.1:8181"])
        .env("RUST_LOG", "error");
    more(&mut command);
    Ok((command, None))
}

/// CoreDNS with the plugins that matter here, and the API server that it lists from, in its own pod.
fn theirs(program: &Path, folder: &Path, count: usize) -> Result<(Command, Option<ListServer>)> {
    let api = ListServer::start()?;
    fill(&api, count);
    let corefile = folder.join("Corefile");
    let text = format!(
        ".:53 {{\n errors\n kubernetes cluster.local in-addr.arpa ip6.arpa {{\n  endpoint http://{}\n }}\n cache 30\n loadbalance\n}}\n",
        api.address
    );
    fs::write(&corefile, text)?;
    let mut command = on_one_cpu(program);
    command
        .args(["-quiet", "-conf"])
        .arg(&corefile)
        .env("GOMAXPROCS", "1");
    Ok((command, Some(api)))
}

fn on_one_cpu(program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", "0"]).arg(program);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn wait(name: &str, server: SocketAddr, question: &[u8]) -> Result<()> {
    let begun = Instant::now();
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    socket.connect(server)?;
    let mut reply = [0; 1232];
    while begun.elapsed() < PATIENCE {
        // Refused, as long as nobody listens.
        let _ = socket.send(question);
        match socket.recv(&mut reply) {
            Ok(12..) if reply[3] & 15 == 0 => return Ok(()),
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
    bail!("{name} has no good answer within {PATIENCE:?}")
}

/// The cluster, with a Service for each server, whose pod it leads to.
fn write(cluster: &ClusterFile, servers: &[Pod], count: usize) -> Result<()> {
    let [listed, slices] = services(count, ENDPOINTS);
    let mut more: Vec<Value> = listed.into_iter().chain(slices).collect();
    let ports = json!([{"name": "dns", "port": 53, "protocol": "UDP"}]);
    for ((name, address), pod) in ASKED.iter().zip(servers) {
        more.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "kube-system", "name": name},
            "spec": {"clusterIP": address, "clusterIPs": [address], "ports": ports},
        }));
        more.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "kube-system", "name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
            "ports": ports, "endpoints": [{"addresses": [pod.address], "conditions": {"ready": true}}],
        }));
    }
    cluster.write_with(&[], &more)
}
