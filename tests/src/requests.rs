//! What clients do that tests start with [`crate::nodes::ask`]: one question to an echo server, and whom they take the answer to
//! be from.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

/// How long a client waits.
pub const TIMEOUT: Duration = Duration::from_secs(2);

/// Connects a datagram socket and asks until another server answers: the answers, each once, refusals among them.
fn follow(at: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind(any(at))?;
    socket.connect(at)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let ask = || -> io::Result<String> {
        socket.send(b"hello")?;
        let mut buffer = [0; 256];
        let len = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..len]).into_owned())
    };
    let first = ask()?;
    let mut seen = vec![first.clone()];
    let start = Instant::now();
    while start.elapsed() < 2 * TIMEOUT {
        let next = match ask() {
            Ok(answer) => answer,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => "refused".into(),
            Err(_) => continue,
        };
        if seen.last() != Some(&next) {
            seen.push(next);
        }
        if seen
            .last()
            .is_some_and(|last| *last != first && last != "refused")
        {
            return Ok(seen.join(", "));
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, seen.join(", ")))
}

/// Carries out `follow ADDRESS` (see above), `tcp ADDRESS`, `udp ADDRESS` or `udp-connected ADDRESS`; by `NUMBER*tcp ADDRESS` so many times over, giving the
/// different answers in order.
pub fn carry_out(request: &str) -> io::Result<String> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, request.to_owned());
    let (what, at) = request.split_once(' ').ok_or_else(invalid)?;
    let at: SocketAddr = at.parse().map_err(|_not_an_address| invalid())?;
    let (times, protocol) = match what.split_once('*') {
        Some((times, protocol)) => (times.parse().map_err(|_no_number| invalid())?, protocol),
        None => (1u32, what),
    };
    let mut answers = std::collections::BTreeSet::new();
    for _ in 0..times {
        answers.insert(match protocol {
            "tcp" => tcp(at)?,
            "udp" => udp(at)?,
            "udp-connected" => udp_connected(at)?,
            "follow" => follow(at)?,
            _ => return Err(invalid()),
        });
    }
    Ok(Vec::from_iter(answers).join(", "))
}

/// The server's answer, and whom the socket takes it to be from.
pub fn tcp(at: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"hello")?;
    let mut buffer = [0; 256];
    let len = stream.read(&mut buffer)?;
    Ok(format!(
        "{} from {}",
        String::from_utf8_lossy(&buffer[..len]),
        stream.peer_addr()?
    ))
}

/// The answer of the server of a connection: its name, and whom it takes the client to be.
pub fn exchange(stream: &mut TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"hello")?;
    let mut buffer = [0; 256];
    match stream.read(&mut buffer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        len => Ok(String::from_utf8_lossy(&buffer[..len]).into_owned()),
    }
}

fn any(at: SocketAddr) -> &'static str {
    if at.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
}

fn udp(at: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind(any(at))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.send_to(b"hello", at)?;
    let mut buffer = [0; 256];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok(format!(
        "{} from {from}",
        String::from_utf8_lossy(&buffer[..len])
    ))
}

fn udp_connected(at: SocketAddr) -> io::Result<String> {
    let socket = UdpSocket::bind(any(at))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.connect(at)?;
    socket.send(b"hello")?;
    let mut buffer = [0; 256];
    let len = socket.recv(&mut buffer)?;
    Ok(format!(
        "{} from {}",
        String::from_utf8_lossy(&buffer[..len]),
        socket.peer_addr()?
    ))
}
