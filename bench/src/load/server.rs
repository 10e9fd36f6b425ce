//! The other end: answers every metric on a port of its own.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::{Metric, datagram, one::CHUNK_BYTES};

const METRICS: usize = Metric::ALL.len();

pub(super) const HTTP_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 1024\r\n\r\n";
pub(super) const HTTP_BODY_BYTES: usize = 1024;

/// Serves all metrics on all addresses, each on its own port, until the process ends.
///
/// # Errors
/// When a port can't be bound.
pub fn serve() -> io::Result<()> {
    bind(Metric::port, Duration::ZERO).map(drop)
}

/// Serves on ports that `port` names (0 for a free one), and says which they are. Each answer but bulk data's costs `handicap` of
/// the CPU more: for what is to notice.
///
/// # Errors
/// When a port can't be bound.
pub fn bind(port: impl Fn(Metric) -> u16, handicap: Duration) -> io::Result<[u16; METRICS]> {
    let mut ports = [0; METRICS];
    for (metric, bound) in Metric::ALL.into_iter().zip(&mut ports) {
        let at = (Ipv4Addr::UNSPECIFIED, port(metric));
        if metric == Metric::Datagram {
            let socket = UdpSocket::bind(at)?;
            *bound = socket.local_addr()?.port();
            thread::spawn(move || datagram::echo(&socket));
        } else {
            let listener = TcpListener::bind(at)?;
            *bound = listener.local_addr()?.port();
            thread::spawn(move || accept_loop(&listener, metric, handicap));
        }
    }
    Ok(ports)
}

fn accept_loop(listener: &TcpListener, metric: Metric, handicap: Duration) {
    for stream in listener.incoming().flatten() {
        // What a connection ended by is its client's to say.
        match metric {
            // Answered in this thread: a hand-over to another would be part of the figure.
            Metric::Connect => drop(answer_once(stream, handicap)),
            Metric::RoundTrip => drop(thread::spawn(move || echo(stream, handicap))),
            Metric::Throughput => drop(thread::spawn(move || sink(stream))),
            Metric::Http => drop(thread::spawn(move || pages(stream, handicap))),
            Metric::Datagram => {}
        }
    }
}

fn spend(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn answer_once(mut stream: TcpStream, handicap: Duration) -> io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    spend(handicap);
    stream.write_all(&byte)?;
    stream.shutdown(Shutdown::Both)
}

fn echo(mut stream: TcpStream, handicap: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        spend(handicap);
        stream.write_all(&byte)?;
    }
}

fn sink(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Answers requests without a body, one after the other, with the same page.
fn pages(mut stream: TcpStream, handicap: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut answer = HTTP_HEAD.to_vec();
    answer.resize(HTTP_HEAD.len() + HTTP_BODY_BYTES, b'x');
    let mut buffer = [0; 4096];
    let mut filled = 0;
    loop {
        let bytes = stream.read(&mut buffer[filled..])?;
        if bytes == 0 {
            return Ok(());
        }
        filled += bytes;
        while let Some(at) = buffer[..filled]
            .windows(4)
            .position(|end| end == b"\r\n\r\n")
        {
            buffer.copy_within(at + 4..filled, 0);
            filled -= at + 4;
            spend(handicap);
            stream.write_all(&answer)?;
        }
        if filled == buffer.len() {
            return Err(io::Error::other("a request of more than 4096 bytes"));
        }
    }
}
