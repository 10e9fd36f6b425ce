//! The programs as their users meet them: started, asked, told to end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A child that does not outlive its test.
struct Running(Child);

impl Running {
    fn terminate(&self) {
        kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM).unwrap();
    }

    fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is what most tests want.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// echo on free ports of the loopback, ready to answer.
struct Echo {
    process: Running,
    http: u16,
    udp: u16,
}

impl Echo {
    fn start(drain_ms: u32) -> Echo {
        let http = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let udp = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut child = Command::new(env!("CARGO_BIN_EXE_echo"))
            .args([
                "--http",
                &format!("127.0.0.1:{http}"),
                "--udp",
                &format!("127.0.0.1:{udp}"),
            ])
            .args(["--drain-ms", &drain_ms.to_string()])
            .env("POD_NAME", "hello-1")
            .env("NODE_NAME", "node-2")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first_line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut first_line)
            .unwrap();
        assert!(first_line.contains("hello-1"), "{first_line}");
        Echo {
            process: Running(child),
            http,
            udp,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.http)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }

    fn get(&self, path: &str) -> String {
        let mut stream = self.connect();
        ask(&mut stream, path)
    }
}

/// One request on a connection that stays open; the whole response as text.
fn ask(stream: &mut TcpStream, path: &str) -> String {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: hello\r\n\r\n").unwrap();
    read_response(stream)
}

fn read_response(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    while !text.ends_with("\r\n\r\n") {
        let read = reader.read_line(&mut text).unwrap();
        assert!(read > 0, "the connection closed after {text:?}");
        let line = text.lines().last().unwrap_or_default().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    text + std::str::from_utf8(&body).unwrap()
}

#[test]
fn echo_names_pod_node_and_client_over_http_and_udp() {
    let echo = Echo::start(0);
    let mut stream = echo.connect();
    let client = stream.local_addr().unwrap();
    let expected = format!("pod=hello-1 node=node-2 client={client}\n");
    assert!(ask(&mut stream, "/").ends_with(&expected));
    assert!(
        ask(&mut stream, "/again").ends_with(&expected),
        "the connection is kept"
    );

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket.send_to(b"hi", ("127.0.0.1", echo.udp)).unwrap();
    let mut answer = [0; 512];
    let (size, from) = socket.recv_from(&mut answer).unwrap();
    assert_eq!(from.port(), echo.udp);
    let client = socket.local_addr().unwrap();
    assert_eq!(
        std::str::from_utf8(&answer[..size]).unwrap(),
        format!("pod=hello-1 node=node-2 client={client}\n")
    );
}

#[test]
fn echo_told_to_end_turns_unready_and_still_serves_old_and_new_connections() {
    let mut echo = Echo::start(1500);
    assert!(echo.get("/readyz").starts_with("HTTP/1.1 200"));
    let mut kept = echo.connect();
    assert!(
        !ask(&mut kept, "/")
            .to_ascii_lowercase()
            .contains("connection: close")
    );

    echo.process.terminate();
    let deadline = Instant::now() + Duration::from_secs(1);
    while echo.get("/readyz").starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < deadline, "it stays ready after SIGTERM");
    }
    assert!(
        echo.get("/healthz").starts_with("HTTP/1.1 200"),
        "it is alive while it drains"
    );
    assert!(
        echo.get("/").contains("pod=hello-1"),
        "new connections are served"
    );
    let last = ask(&mut kept, "/");
    assert!(last.contains("pod=hello-1"), "kept connections are served");
    assert!(
        last.to_ascii_lowercase().contains("connection: close"),
        "and told to go: {last}"
    );
    let status = echo.process.ended_within(Duration::from_secs(5));
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
}

#[test]
fn echo_lets_a_request_in_flight_finish_after_the_drain() {
    let mut echo = Echo::start(100);
    let mut stream = echo.connect();
    ask(&mut stream, "/");
    write!(
        stream,
        "POST / HTTP/1.1\r\nHost: hello\r\nContent-Length: 4\r\n\r\nhe"
    )
    .unwrap();
    echo.process.terminate();
    assert!(
        echo.process
            .ended_within(Duration::from_millis(600))
            .is_none(),
        "it waits for the request"
    );
    assert!(
        TcpStream::connect(("127.0.0.1", echo.http)).is_err(),
        "it accepts no more"
    );
    write!(stream, "lo").unwrap();
    assert!(read_response(&mut stream).contains("pod=hello-1"));
    assert!(echo.process.ended_within(Duration::from_secs(2)).is_some());
}

fn output(program: &str, arguments: &str, input: &str) -> (bool, String, String) {
    let mut child = Command::new(program)
        .args(arguments.split(' '))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.success(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn wget_prints_the_document_and_tells_why_it_could_not() {
    let echo = Echo::start(0);
    let wget = |arguments: String| output(env!("CARGO_BIN_EXE_wget"), &arguments, "");
    let (success, document, _) = wget(format!("-T 5 -qO- http://localhost:{}/", echo.http));
    assert!(
        success && document.starts_with("pod=hello-1 "),
        "{document}"
    );
    let (success, document, _) = wget(format!(
        "-qO- --post-data a=b http://127.0.0.1:{}/",
        echo.http
    ));
    assert!(
        success && document.starts_with("pod=hello-1 "),
        "{document}"
    );

    drop(echo.process);
    let (success, _, error) = wget(format!("-T 5 -qO- http://127.0.0.1:{}/", echo.http));
    assert!(
        !success && error.contains("can't connect to remote host (127.0.0.1)"),
        "{error}"
    );
    assert!(error.contains("refused"), "{error}");
}

#[test]
fn nc_carries_standard_input_and_output_over_tcp_and_udp() {
    let echo = Echo::start(0);
    let nc = |arguments: String, input| output(env!("CARGO_BIN_EXE_nc"), &arguments, input);
    let request = "GET / HTTP/1.1\r\nHost: hello\r\nConnection: close\r\n\r\n";
    let (success, answer, _) = nc(format!("127.0.0.1 {}", echo.http), request);
    assert!(success && answer.contains("pod=hello-1"), "{answer}");
    let (success, answer, _) = nc(format!("-u -W1 127.0.0.1 {}", echo.udp), "hi");
    assert!(success && answer.starts_with("pod=hello-1"), "{answer}");
    assert!(nc(format!("-z 127.0.0.1 {}", echo.http), "").0);

    drop(echo.process);
    let (success, _, error) = nc(format!("-u -w1 127.0.0.1 {}", echo.udp), "hi");
    assert!(
        !success && error.contains("no answer from 127.0.0.1"),
        "{error}"
    );
}

#[test]
fn pause_waits_and_ends_on_sigterm() {
    let mut pause = Running(Command::new(env!("CARGO_BIN_EXE_pause")).spawn().unwrap());
    assert!(pause.ended_within(Duration::from_millis(100)).is_none());
    pause.terminate();
    let status = pause.ended_within(Duration::from_secs(2)).expect("it ends");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn pause_as_pid_1_ends_on_sigterm_and_reaps_orphans() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    // The shell leaves an orphan behind and becomes pause; the orphan's end is PID 1's to collect.
    let script = format!("(sleep 0.2 & ) ; exec {}", env!("CARGO_BIN_EXE_pause"));
    let mut outer = Running(
        Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "sh", "-c", &script])
            .spawn()
            .unwrap(),
    );
    let children = |pid: u32| -> Vec<u32> {
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .unwrap_or_default()
            .split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect()
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    let pause = loop {
        assert!(
            Instant::now() < deadline,
            "pause did not start with its orphan"
        );
        if let [pid] = children(outer.0.id())[..]
            && !children(pid).is_empty()
        {
            break pid;
        }
    };
    while !children(pause).is_empty() {
        assert!(
            Instant::now() < deadline,
            "the orphan is still there, as a zombie"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(pause as i32), Signal::SIGTERM).unwrap();
    assert!(
        outer.ended_within(Duration::from_secs(2)).is_some(),
        "PID 1 ends on SIGTERM"
    );
}
