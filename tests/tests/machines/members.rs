//! The members of an etcd that control planes bring: who knows whom, their certificates, and joins that end in the middle.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;

use keelway_tests::process::eventually;
use keelway_tests::sandbox::is_root;
use nix::sys::signal::{Signal, kill};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::control_planes::{begin, voters};
use crate::machine::{CHANGE_TIMEOUT, Cluster, Machine, UP_TIMEOUT, sandbox};

const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;

/// What a member of etcd says to somebody who asks for its version.
struct Said {
    /// The certificate that it shows.
    certificate: Vec<u8>,
    /// The first line of its answer; nothing when it ended the connection instead.
    answer: String,
}

/// Asks a machine's member at one of its ports, with a pair of the machine's credentials or without any.
#[track_caller]
fn ask(machine: &Machine, port: u16, identity: Option<&str>) -> Said {
    let file = |name: String| machine.node_file("credentials").join(name);
    let certificate = |name: &str| {
        CertificateDer::from_pem_file(file(format!("{name}.crt"))).expect("a certificate")
    };
    let mut roots = RootCertStore::empty();
    roots.add(certificate("etcd-ca")).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match identity {
        Some(name) => {
            let key = PrivateKeyDer::from_pem_file(file(format!("{name}.key"))).expect("a key");
            let chain = vec![certificate(name)];
            config.with_client_auth_cert(chain, key).expect("a pair")
        }
        None => config.with_no_client_auth(),
    };
    let address: IpAddr = machine.address.parse().expect("an address");
    let name = ServerName::from(address);
    let mut tls = ClientConnection::new(Arc::new(config), name).expect("a client");
    let connect = || TcpStream::connect((address, port));
    let mut socket = machine.network.run(connect).expect("connected");
    socket.set_read_timeout(Some(CHANGE_TIMEOUT)).expect("set");
    while tls.is_handshaking() {
        tls.complete_io(&mut socket)
            .expect("etcd's certificate holds");
    }
    let shown = tls.peer_certificates().expect("one")[0].to_vec();
    // Whom it does not let in, it tells after its own part of the handshake.
    let mut stream = rustls::Stream::new(&mut tls, &mut socket);
    let mut answer = String::new();
    let request = b"GET /version HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n\r\n";
    if stream.write_all(request).is_ok() {
        // An alert is an error, as is an end without one.
        let _ = BufReader::new(stream).read_line(&mut answer);
    }
    Said {
        certificate: shown,
        answer: answer.trim().to_owned(),
    }
}

/// The certificate that a machine's member shows.
#[track_caller]
fn served(machine: &Machine) -> Vec<u8> {
    let said = ask(machine, CLIENTS, Some("etcd-client"));
    assert_eq!(said.answer, "HTTP/1.1 200 OK");
    said.certificate
}

/// Writes by the API server of one control plane, which may take its time.
#[track_caller]
fn write_by(server: &Machine, name: &str) {
    let cluster = Cluster { server };
    eventually("a write is answered", CHANGE_TIMEOUT, || {
        let made = cluster.kubectl(&["create", "configmap", name]);
        let there = made.stderr.contains("already exists");
        (made.success || there).then_some(()).ok_or(made.stderr)
    });
}

#[test]
fn every_control_plane_knows_all_members_and_renews_its_own() {
    if !is_root("every_control_plane_knows_all_members_and_renews_its_own") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let machines = [8, 9, 10].map(|number| Machine::new(folder.path(), number));
    let [first, second, third] = &machines;
    let running = begin(&machines);

    // Signed for a year, and anew by the etcd's own authority, which stays.
    let authority = first.keelway(&["certs", "renew", "etcd-ca"]).refused();
    assert!(
        authority.contains("an authority, which stays"),
        "{authority}"
    );
    for machine in &machines {
        let listed = machine.keelway(&["certs", "list"]).ok();
        for name in ["etcd-ca", "etcd", "etcd-client"] {
            let line = listed
                .lines()
                .find(|line| line.split(' ').next() == Some(name));
            let days = line.and_then(|line| line.split_whitespace().nth(2)?.parse::<u32>().ok());
            let days = days.unwrap_or_else(|| panic!("no {name} in {listed}"));
            assert_eq!(days <= 366, name != "etcd-ca", "{listed}");
        }
        let before = served(machine);
        let renewed = machine
            .keelway(&["certs", "renew", "etcd", "etcd-client"])
            .ok();
        assert_eq!(renewed, "etcd is renewed.\netcd-client is renewed.\n");
        assert_ne!(served(machine), before, "etcd serves the one of before");
    }

    // Nobody else gets in, at either port: not without a certificate, nor with one that the cluster's authority has signed.
    for port in [CLIENTS, PEERS] {
        for stranger in [None, Some("apiserver-kubelet-client"), Some("apiserver")] {
            assert_eq!(
                ask(first, port, stranger).answer,
                "",
                "{stranger:?} at {port}"
            );
        }
        assert_eq!(ask(first, port, Some("etcd")).answer, "HTTP/1.1 200 OK");
    }

    // The machine that began it all was told of its own member only.
    for machine in &machines {
        let path = machine.node_file("var/lib/keelway/etcd-members");
        eventually("all members are remembered", CHANGE_TIMEOUT, || {
            let known = std::fs::read_to_string(&path).unwrap_or_default();
            let all = known.lines().count() == machines.len();
            all.then_some(()).ok_or(known)
        });
    }
    let stands_still = first.service("etcd");
    kill(stands_still, Signal::SIGSTOP).expect("stopped");
    write_by(first, "by-others");
    // So does one that starts.
    kill(first.service("keelway-controlplane"), Signal::SIGKILL).expect("killed");
    write_by(first, "by-others-again");
    kill(stands_still, Signal::SIGCONT).expect("it goes on");

    // Members meet again, by the certificates that they have now.
    for machine in [second, third, first] {
        kill(machine.service("etcd"), Signal::SIGKILL).expect("killed");
        kill(machine.service("keelway-controlplane"), Signal::SIGKILL).expect("killed");
        write_by(machine, &format!("after-{}", machine.name));
    }
    assert_eq!(voters(first).len(), machines.len());
    let cluster = Cluster { server: second };
    let maps = cluster
        .kubectl(&["get", "configmaps", "--output", "name"])
        .ok();
    let made = maps
        .lines()
        .filter(|line| line.contains("by-others") || line.contains("after-"));
    assert_eq!(made.count(), 5, "{maps}");
    drop(running);
}

/// Has a machine join as a control plane, and kills that as soon as its member of etcd has a vote.
#[track_caller]
fn join_and_die(first: &Machine, machine: &Machine) -> Vec<String> {
    let joins = first.offer();
    let mut arguments = machine.join(&joins);
    arguments.push("--foreground");
    let joining = machine.keelway_running(&arguments);
    eventually("it has a vote", UP_TIMEOUT, || {
        let known = machine.known();
        let votes = known["etcd"]["votes"] == true;
        votes.then_some(()).ok_or(known.to_string())
    });
    drop(joining);
    machine.wait_ended();
    assert_eq!(machine.known()["unannounced"], true, "it came to its end");
    joins
}

#[test]
fn a_join_that_ends_after_its_vote_goes_on_or_leaves() {
    if !is_root("a_join_that_ends_after_its_vote_goes_on_or_leaves") {
        return;
    }
    let _sandbox = sandbox();
    let folder = tempfile::tempdir().expect("a folder");
    let machines = [13, 14, 15].map(|number| Machine::new(folder.path(), number));
    let [first, second, third] = &machines;
    let running = begin(&machines[..2]);
    let before = voters(first);

    // The others count on it, and do without it.
    let joins = join_and_die(first, third);
    assert_eq!(voters(first).len(), 3);
    write_by(second, "without");
    let again = third.keelway(&third.join(&joins)).refused();
    assert!(
        again.contains("already") && again.contains("keelway start"),
        "{again}"
    );

    // It goes on: as a control plane that the cluster knows as such.
    let started = third.keelway_running(&["start", "--foreground"]);
    let cluster = Cluster { server: third };
    eventually("it is a control plane", CHANGE_TIMEOUT, || {
        let selector = "node-role.kubernetes.io/control-plane";
        let nodes = cluster.kubectl(&["get", "nodes", "--selector", selector, "--output", "name"]);
        let there = nodes.stdout.contains(&third.name);
        there.then_some(()).ok_or(nodes.to_string())
    });
    assert_eq!(third.known()["unannounced"], false);
    cluster.kubectl(&["get", "configmap", "without"]).ok();
    cluster.wait_ready(&third.name);
    third.keelway(&["leave", "--drain-timeout", "60"]).ok();
    drop(started);
    assert_eq!(voters(first), before);

    // Or it leaves, without ever having run.
    join_and_die(first, third);
    let refused = third.keelway(&["leave"]).refused();
    assert!(!refused.is_empty() && third.state.exists(), "{refused}");
    third.keelway(&["leave", "--force"]).ok();
    assert!(!third.state.exists(), "something is left");
    assert_eq!(voters(second), before);
    write_by(first, "after-all");
    drop(running);
}
