//! Clients, and what comes of their requests.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use nix::sys::stat::fstat;
use serde_json::{Value, json};

/// How long one request may take. A lost packet of TCP is sent again within a second, and shows.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two requests of a client.
const PACE: Duration = Duration::from_millis(20);

/// What a client does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A connection for each request.
    Http,
    /// A connection that is kept until its server says that it ends.
    KeptHttp,
    /// A socket for each datagram.
    Udp,
    /// A connected socket, the same to the end.
    ConnectedUdp,
}

pub const KINDS: [Kind; 4] = [Kind::Http, Kind::KeptHttp, Kind::Udp, Kind::ConnectedUdp];

/// What came of a client's requests.
#[derive(Debug, Default)]
pub struct Tally {
    pub asked: u64,
    pub slowest: Duration,
    pub failed: Vec<Failure>,
}

/// A request that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Since the beginning.
    pub when: Duration,
    pub took: Duration,
    pub why: String,
    /// By which way, where the socket had one.
    pub way: Option<Way>,
}

/// The ends of a socket as the kernel has them: of one that was translated, the far end is the backend.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// An error of a socket that is still there, and its way.
type Failed = (io::Error, Option<Way>);

/// A client of one kind, with the sockets that it keeps.
struct Asking {
    kind: Kind,
    at: SocketAddr,
    kept: Option<BufReader<TcpStream>>,
    connected: Option<UdpSocket>,
    number: u64,
}

impl Asking {
    fn once(&mut self) -> Result<(), Failed> {
        self.number += 1;
        match self.kind {
            Kind::Http => self.get(&mut connected(self.at)?, true).map(drop),
            Kind::KeptHttp => {
                let mut stream = match self.kept.take() {
                    Some(stream) => stream,
                    None => connected(self.at)?,
                };
                let ends = self.get(&mut stream, false)?;
                self.kept = (!ends).then_some(stream);
                Ok(())
            }
            Kind::Udp => self.datagram(&datagram_socket(self.at).map_err(without_way)?),
            Kind::ConnectedUdp => {
                let socket = match self.connected.take() {
                    Some(socket) => socket,
                    None => datagram_socket(self.at).map_err(without_way)?,
                };
                let asked = self.datagram(&socket);
                self.connected = Some(socket);
                asked
            }
        }
    }

    fn get(&self, stream: &mut BufReader<TcpStream>, last: bool) -> Result<bool, Failed> {
        get(stream, last).map_err(|error| (error, way(&TCP, stream.get_ref())))
    }

    fn datagram(&self, socket: &UdpSocket) -> Result<(), Failed> {
        let mut buffer = [0; 512];
        let sent = socket.send(self.number.to_string().as_bytes());
        let heard = sent.and_then(|_| socket.recv(&mut buffer).map(drop));
        heard.map_err(|error| (error, way(&UDP, socket)))
    }
}

fn without_way(error: io::Error) -> Failed {
    (error, None)
}

/// The kernel's lists of sockets.
const TCP: [&str; 2] = ["tcp", "tcp6"];
const UDP: [&str; 2] = ["udp", "udp6"];

/// The way of a socket by the kernel's lists: what the socket itself tells of its peer is what it asked for.
fn way(lists: &[&str], socket: &impl AsFd) -> Option<Way> {
    let own = fstat(socket).ok()?.st_ino.to_string();
    let read = |list: &&str| fs::read_to_string(format!("/proc/thread-self/net/{list}")).ok();
    let all: String = lists.iter().filter_map(read).collect();
    all.lines().find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (from, to, inode) = (words.get(1)?, words.get(2)?, words.get(9)?);
        let (from, to) = (listed(from)?, listed(to)?);
        (**inode == own).then_some(Way { from, to })
    })
}

/// An address and port of such a list: words of 32 bits as the machine holds them.
fn listed(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok();
    let words: Option<Vec<[u8; 4]>> = (0..address.len())
        .step_by(8)
        .map(|at| word(at).map(u32::to_ne_bytes))
        .collect();
    let bytes = words?.concat();
    let address = match <[u8; 4]>::try_from(&bytes[..]) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(&bytes[..]).ok()?),
    };
    Some(SocketAddr::new(
        address,
        u16::from_str_radix(port, 16).ok()?,
    ))
}

fn datagram_socket(at: SocketAddr) -> io::Result<UdpSocket> {
    let any = match at {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(at)?;
    Ok(socket)
}

pub fn open(at: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    connected(at).map_err(|(error, _)| error)
}

/// A connection. Where none came about, the socket is still there when its way is looked for.
fn connected(at: SocketAddr) -> Result<BufReader<TcpStream>, Failed> {
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None);
    let stream = TcpStream::from(socket.map_err(|error| without_way(error.into()))?);
    match connect_within(&stream, at) {
        Ok(()) => Ok(BufReader::new(stream)),
        Err(error) => Err((error, way(&TCP, &stream))),
    }
}

fn connect_within(stream: &TcpStream, at: SocketAddr) -> io::Result<()> {
    match connect(stream.as_raw_fd(), &SockaddrStorage::from(at)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let mut waiting = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    let patience = PollTimeout::try_from(PATIENCE).map_err(io::Error::other)?;
    if poll(&mut waiting, patience)? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)
}

/// A request, and whether the server ends the connection with its answer.
pub fn get(stream: &mut BufReader<TcpStream>, last: bool) -> io::Result<bool> {
    let connection = if last { "close" } else { "keep-alive" };
    let request = format!("GET / HTTP/1.1\r\nhost: web\r\nconnection: {connection}\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes())?;
    let (mut length, mut ends, mut status) = (0, last, String::new());
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        } else if status.is_empty() {
            status = line;
        } else if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap_or(0);
        } else if line == "connection: close" {
            ends = true;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    if status.contains(" 200 ") && body.starts_with(b"pod=") {
        Ok(ends)
    } else {
        Err(io::Error::other(status))
    }
}

/// Asks until `ended`.
pub fn run(kind: Kind, at: SocketAddr, began: Instant, ended: impl Fn() -> bool) -> Tally {
    let mut tally = Tally::default();
    let mut asking = Asking {
        kind,
        at,
        kept: None,
        connected: None,
        number: 0,
    };
    while !ended() {
        let start = Instant::now();
        let asked = asking.once();
        tally.asked += 1;
        tally.slowest = tally.slowest.max(start.elapsed());
        if let Err((error, way)) = asked {
            tally.failed.push(Failure {
                when: start.duration_since(began),
                took: start.elapsed(),
                why: error.to_string(),
                way,
            });
        }
        thread::sleep(PACE);
    }
    tally
}

/// A client in a process of its own, in a control group whose sockets are translated: `<kind> <address> <group> <seconds> <began>`, the
/// last one in microseconds of the clock.
pub fn carry_out(request: &str) -> io::Result<String> {
    let words: Vec<&str> = request.split(' ').collect();
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, request.to_owned());
    let [kind, at, group, seconds, beginning] = words[..] else {
        return Err(invalid());
    };
    let named = |one: &&Kind| format!("{one:?}") == kind;
    let kind = *KINDS.iter().find(named).ok_or_else(invalid)?;
    let at = at.parse().map_err(|_no_address| invalid())?;
    let seconds = seconds.parse().map_err(|_no_number| invalid())?;
    fs::write(
        PathBuf::from(group).join("cgroup.procs"),
        std::process::id().to_string(),
    )?;
    let beginning = beginning.parse().map_err(|_no_number| invalid())?;
    let late = since_epoch().saturating_sub(Duration::from_micros(beginning));
    let began = Instant::now();
    let life = Duration::from_secs(seconds).saturating_sub(late);
    let tally = run(kind, at, began, || began.elapsed() >= life);
    let failed: Vec<Value> = tally
        .failed
        .iter()
        .map(|one| {
            json!([
                (one.when + late).as_secs_f64(),
                one.took.as_secs_f64(),
                one.why,
                one.way.map(|way| [way.from, way.to])
            ])
        })
        .collect();
    Ok(json!([tally.asked, tally.slowest.as_secs_f64(), failed]).to_string())
}

pub fn since_epoch() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default()
}

pub fn read_tally(answer: &str) -> anyhow::Result<Tally> {
    type Told = (f64, f64, String, Option<[SocketAddr; 2]>);
    let read: (u64, f64, Vec<Told>) =
        serde_json::from_str(answer).with_context(|| answer.to_owned())?;
    let failed = read.2.into_iter();
    Ok(Tally {
        asked: read.0,
        slowest: Duration::from_secs_f64(read.1),
        failed: failed
            .map(|(when, took, why, way)| Failure {
                when: Duration::from_secs_f64(when),
                took: Duration::from_secs_f64(took),
                why,
                way: way.map(|[from, to]| Way { from, to }),
            })
            .collect(),
    })
}

#[test]
fn the_way_of_a_socket_is_what_the_kernel_lists() {
    for any in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(any).expect("a listener");
        let stream = TcpStream::connect(listener.local_addr().expect("its address"));
        let stream = stream.expect("a connection");
        let peer = UdpSocket::bind(any).expect("a socket");
        let socket = UdpSocket::bind(any).expect("a socket");
        socket
            .connect(peer.local_addr().expect("its address"))
            .expect("connected");
        for (way, from, to) in [
            (way(&TCP, &stream), stream.local_addr(), stream.peer_addr()),
            (way(&UDP, &socket), socket.local_addr(), socket.peer_addr()),
        ] {
            let way = way.expect("a way");
            assert_eq!((way.from, way.to), (from.expect("it"), to.expect("it")));
        }
    }
}
