//! `keelway-dns` as a process, through what clusters do to it: outages and relists of the API server, restarts, rollouts and
//! changed configurations. Names that exist are never denied.

mod agent;
mod hostile;
mod outside;
mod support;

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keelway_tests::cluster::program;
use keelway_tests::lists::services;
use keelway_tests::process::eventually;
use nix::sys::signal::Signal;

use support::{
    Clients, NOERROR, NXDOMAIN, SERVFAIL, Server, api, ask, ask_by_tcp, free_port, service_name,
};

#[test]
fn names_are_answered_while_the_api_server_is_away_and_news_are_taken_when_it_is_back() {
    let (api, _folder, kubeconfig) = api(200, 2);
    let server = Server::start(&kubeconfig, &["--threads", "1"]);
    server.wait_ready();
    api.go_away();
    let address = server.address;
    let clients = Clients::start(2, 200, move || address);
    // Long enough for every watch to have failed and been tried again several times; or as long as one likes.
    let away_s = std::env::var("KEELWAY_DNS_AWAY_S").ok();
    let away_s = away_s.map_or(8, |text| text.parse().expect("seconds"));
    let [mut listed, slices] = services(201, 2);
    listed.remove(0);
    api.set("services", listed);
    api.set("endpointslices", slices);
    let until = Instant::now() + Duration::from_secs(away_s);
    while Instant::now() < until {
        assert_eq!(
            ask(address, &service_name(0)),
            Some((NOERROR, 1)),
            "the last state is served"
        );
        assert!(server.http("/readyz").is_ok(), "it serves, so it is ready");
    }
    let counts = clients.finish();
    println!("away for {away_s} s: {counts:?}");
    assert!(
        counts.good > 1000 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
    api.come_back();
    eventually("the news", Duration::from_secs(20), || {
        match (
            ask(address, &service_name(0)),
            ask(address, &service_name(200)),
        ) {
            (Some((NXDOMAIN, 0)), Some((NOERROR, 1))) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn a_storm_of_restarts_denies_nothing() {
    let (_api, _folder, kubeconfig) = api(2000, 5);
    for _ in 0..10 {
        let server = Server::start(&kubeconfig, &["--threads", "1"]);
        let mut seen = [0; 3];
        let end = Instant::now() + Duration::from_secs(30);
        // From the first packet that it hears to the first good answer.
        loop {
            assert!(
                Instant::now() < end,
                "it does not come to know the cluster: {seen:?}"
            );
            match ask(server.address, &service_name(1998)) {
                None => seen[0] += 1,
                Some((SERVFAIL, _)) => seen[1] += 1,
                Some((NOERROR, 1)) => break,
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        server.signal(Signal::SIGKILL);
    }
}

#[test]
fn ten_thousand_services_and_a_hundred_thousand_endpoints_are_relisted_within_bounds() {
    let (api, _folder, kubeconfig) = api(10_000, 10);
    let server = Server::start(&kubeconfig, &["--threads", "1"]);
    server.wait_ready();
    let before = server.memory_most_mb();
    let address = server.address;
    let clients = Clients::start(1, 9000, move || address);
    let lists = api.lists();
    for round in 1..=3 {
        api.expire();
        eventually("a relist", Duration::from_secs(60), || match api.lists() {
            count if count >= lists + 2 * round => Ok(()),
            count => Err(format!("{count} lists")),
        });
    }
    // The last lists have been taken in when what they brought is served.
    let [listed, slices] = services(10_001, 10);
    api.set("services", listed);
    api.set("endpointslices", slices);
    api.expire();
    eventually("the last list", Duration::from_secs(60), || {
        match ask(address, &service_name(10_000)) {
            Some((NOERROR, 1)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let counts = clients.finish();
    let after = server.memory_most_mb();
    println!("most memory: {before:.0} MB after the first list, {after:.0} MB after four more");
    assert!(
        counts.good > 100 && counts.denied + counts.servfail + counts.unanswered == 0,
        "{counts:?}"
    );
    // A list is taken in beside those who answer: the longest wait is a small part of what that takes.
    assert!(counts.slowest < Duration::from_secs(2), "{counts:?}");
    // The limit of the DaemonSet is 170 MiB.
    assert!(after < 150.0, "{after} MB");
}

#[test]
fn a_rollout_loses_no_query() {
    let (_api, _folder, kubeconfig) = api(100, 2);
    let mut current = Server::start(&kubeconfig, &["--threads", "2", "--lameduck", "2"]);
    current.wait_ready();
    let address = Arc::new(AtomicUsize::new(usize::from(current.address.port())));
    let port = address.clone();
    // Clients ask whoever is ready, and learn of a change late: up to a second after readiness has gone.
    let clients = Clients::start(4, 90, move || {
        (Ipv4Addr::LOCALHOST, port.load(Ordering::Relaxed) as u16).into()
    });
    let port = address.clone();
    let by_tcp = Clients::start_with(2, 90, ask_by_tcp, move || {
        (Ipv4Addr::LOCALHOST, port.load(Ordering::Relaxed) as u16).into()
    });
    for _ in 0..3 {
        let next = Server::start(&kubeconfig, &["--threads", "2", "--lameduck", "2"]);
        next.wait_ready();
        current.signal(Signal::SIGTERM);
        eventually(
            "readiness to go",
            Duration::from_secs(5),
            || match current.http("/readyz") {
                Err(body) if body.contains("stopping") => Ok(()),
                other => Err(format!("{other:?}")),
            },
        );
        thread::sleep(Duration::from_secs(1));
        address.store(usize::from(next.address.port()), Ordering::Relaxed);
        let status = current.child.wait().expect("it ends");
        assert!(status.success(), "{status}");
        current = next;
    }
    for (counts, least) in [(clients.finish(), 1000), (by_tcp.finish(), 100)] {
        assert!(
            counts.good > least && counts.denied + counts.servfail + counts.unanswered == 0,
            "{counts:?}"
        );
    }
}

#[test]
fn a_changed_corefile_is_taken_over_and_one_with_an_error_is_not() {
    let (_api, folder, kubeconfig) = api(10, 1);
    let corefile = folder.path().join("Corefile");
    let listen = free_port();
    let write = |domain: &str, more: &str| {
        let text = format!(
            ".:{} {{\n kubernetes {domain} in-addr.arpa\n errors\n {more}\n}}\n",
            listen.port()
        );
        let partial = folder.path().join("partial");
        fs::write(&partial, text).expect("written");
        fs::rename(&partial, &corefile).expect("renamed");
    };
    write("cluster.local", "");
    let config = corefile.display().to_string();
    let server = Server::start(&kubeconfig, &["--threads", "1", "--config", &config]);
    server.wait_ready();
    let in_domain = |domain: &str| ask(server.address, &format!("svc-0.ns-0.svc.{domain}"));
    assert_eq!(in_domain("cluster.local"), Some((NOERROR, 1)));
    write("other.example", "no-such-plugin");
    eventually("the error to be counted", Duration::from_secs(10), || {
        let metrics = server.http("/metrics")?;
        let counted = metrics
            .lines()
            .any(|line| line == "coredns_reload_failed_total 1");
        if counted { Ok(()) } else { Err(metrics) }
    });
    assert_eq!(in_domain("cluster.local"), Some((NOERROR, 1)));
    write("other.example", "");
    eventually(
        "the new domain",
        Duration::from_secs(10),
        || match in_domain("other.example") {
            Some((NOERROR, 1)) => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    let query = Command::new(program("keelway-dns"))
        .args(["query", "svc-0.ns-0.svc.other.example", "--explain"])
        .args(["--server", &server.address.to_string()])
        .args(["--explain-port", &server.health.port().to_string()])
        .output()
        .expect("keelway-dns runs");
    let told = String::from_utf8_lossy(&query.stdout);
    for part in ["from Service ns-0/svc-0", "other.example.", ";; ANSWER"] {
        assert!(told.contains(part), "{part}: {told} {query:?}");
    }
}

#[test]
fn a_variable_that_holds_its_own_name_is_taken_as_it_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corefile = folder.path().join("Corefile");
    fs::write(&corefile, "{$ZONE}.example {\n errors\n}\n").expect("written");
    let check = Command::new(program("keelway-dns"))
        .arg("check")
        .arg(&corefile)
        .env("ZONE", "{$ZONE}")
        .output()
        .expect("keelway-dns runs");
    assert!(check.status.success(), "{check:?}");
}
