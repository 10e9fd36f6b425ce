//! What the agent shows to others: its socket and its metrics, with a loop that the test plays.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use keelway_agent::event::Event;
use keelway_agent::report::{Counter, Report};
use keelway_agent::{metrics, socket};
use keelway_cni::protocol::{MESSAGE_LEN_MAX, Request, Response, ask};

/// A loop that answers a report to whoever asks, and ends with its senders.
fn play(events: Receiver<Event>, report: Report) {
    thread::spawn(move || {
        for event in events {
            match event {
                Event::Report { reply } => reply
                    .send(Box::new(report.clone()))
                    .expect("somebody waits"),
                Event::Request {
                    request: Request::Report,
                    reply,
                    ..
                } => {
                    let value = serde_json::to_value(&report).expect("JSON");
                    reply.send(Response::Report(value)).expect("somebody waits");
                }
                other => panic!("{other:?}"),
            }
        }
    });
}

/// Sends bytes as they are, and gives the answer.
fn say(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).expect("connect");
    // The agent may refuse, and close, before everything is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn the_socket_answers_nonsense_with_an_error_and_goes_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("run/agent.sock");
    let (events, inbox) = channel();
    socket::serve(socket::listen(&path).expect("listen"), events).expect("serve");
    play(
        inbox,
        Report {
            node: "node-1".into(),
            ..Report::default()
        },
    );

    let too_long = vec![b' '; MESSAGE_LEN_MAX + 1];
    for nonsense in [
        &b""[..],
        b"{",
        b"[]",
        b"{\"command\": \"FROB\"}",
        b"\xff\x00",
        &too_long,
    ] {
        let answer = say(&path, nonsense);
        assert!(
            answer.contains("error") && answer.contains("cannot read the request"),
            "{answer}"
        );
    }
    let asked = ask(&path, &Request::Report, None, Duration::from_secs(5)).expect("an answer");
    let Response::Report(report) = asked else {
        panic!("{asked:?}")
    };
    assert_eq!(report["node"], "node-1");
}

#[test]
fn the_socket_is_for_root_alone_and_replaces_a_stale_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("agent.sock");
    drop(socket::listen(&path).expect("listen"));
    assert!(path.exists(), "as after a crash");
    let _listener = socket::listen(&path).expect("listen again");
    assert_eq!(
        std::fs::metadata(&path).expect("it").permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn an_agent_that_ends_tells_its_clients_to_try_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("agent.sock");
    let (events, inbox) = channel();
    socket::serve(socket::listen(&path).expect("listen"), events).expect("serve");
    drop(inbox);
    let asked = ask(&path, &Request::Status, None, Duration::from_secs(5)).expect("an answer");
    let Response::Error(error) = asked else {
        panic!("{asked:?}")
    };
    assert_eq!(u32::from(error.code), 11);
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )
    .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn metrics_and_health_follow_the_report() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let serve = |report: Report| {
        let (events, inbox) = channel();
        play(inbox, report);
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind(("127.0.0.1", 0)))
            .expect("bind");
        let port = listener.local_addr().expect("an address").port();
        runtime.spawn(metrics::serve(listener, events));
        port
    };
    let counters = vec![Counter {
        reason: "no_backend".into(),
        class: "reject".into(),
        packets: 3,
    }];
    let cni_requests = [("ADD served".to_owned(), 7)].into();
    let ready = serve(Report {
        ready: true,
        frontends: 5,
        counters,
        cni_requests,
        ..Report::default()
    });
    let text = get(ready, "/metrics");
    for line in [
        "keelway_ready 1",
        "keelway_frontends 5",
        "keelway_dataplane_total{reason=\"no_backend\",class=\"reject\"} 3",
        "keelway_cni_requests_total{command=\"ADD\",outcome=\"served\"} 7",
        "# EOF",
    ] {
        assert!(text.contains(&format!("\n{line}\n")), "{line} in\n{text}");
    }
    assert!(get(ready, "/readyz").starts_with("HTTP/1.1 200"));
    assert!(get(ready, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(get(ready, "/secrets").starts_with("HTTP/1.1 404"));

    let waiting = serve(Report {
        problems: vec!["waiting for Node".into()],
        ..Report::default()
    });
    let text = get(waiting, "/readyz");
    assert!(
        text.starts_with("HTTP/1.1 503") && text.contains("waiting for Node"),
        "{text}"
    );
    assert!(
        get(waiting, "/healthz").starts_with("HTTP/1.1 200"),
        "it lives, it only waits"
    );
}
