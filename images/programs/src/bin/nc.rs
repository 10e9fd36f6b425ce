//! nc: connects standard input and output with a TCP connection or a UDP peer. busybox's applet knows no UDP.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use keelway_image_programs::resolver;

#[derive(Parser)]
#[command(about = "Connects standard input and output with a TCP connection or a UDP peer")]
struct Flags {
    /// Use UDP: what is read at once is sent as one datagram
    #[arg(short = 'u')]
    udp: bool,
    /// Seconds to wait for a connection, and for more from the peer once the input has ended
    #[arg(short = 'w', value_name = "SECONDS")]
    wait_s: Option<u64>,
    /// Datagrams, or reads, after which to end
    #[arg(short = 'W', value_name = "COUNT")]
    receive_max: Option<u32>,
    /// Only see whether a connection can be made
    #[arg(short = 'z')]
    scan: bool,
    host: String,
    port: u16,
}

/// How long a connection may take, and how long a UDP peer may be silent, when nobody says.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match run(&Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<()> {
    let patience = flags
        .wait_s
        .map_or(PATIENCE, |seconds| Duration::from_secs(seconds.max(1)));
    let addresses = resolver::addresses(&flags.host, patience)?;
    if flags.udp {
        let address = *addresses.first().context("a host has an address")?;
        return udp(flags, SocketAddr::new(address, flags.port), patience);
    }
    let stream = connect(&addresses, flags.port, patience)?;
    if flags.scan {
        return Ok(());
    }
    tcp(flags, stream)
}

fn connect(addresses: &[IpAddr], port: u16, patience: Duration) -> Result<TcpStream> {
    let mut failures = Vec::new();
    for address in addresses {
        let address = SocketAddr::new(*address, port);
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => failures.push(format!("cannot connect to {address}: {error}")),
        }
    }
    bail!("{}", failures.join("; "))
}

fn tcp(flags: &Flags, mut stream: TcpStream) -> Result<()> {
    let mut sending = stream.try_clone()?;
    let wait_s = flags.wait_s;
    std::thread::spawn(move || {
        // A peer that takes no more is noticed by the reading side.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut sending);
        let _ = sending.shutdown(Shutdown::Write);
        if let Some(seconds) = wait_s {
            let _ = sending.set_read_timeout(Some(Duration::from_secs(seconds.max(1))));
        }
    });
    let mut buffer = vec![0; 1 << 16];
    let mut received = 0;
    let mut stdout = std::io::stdout().lock();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                stdout.write_all(&buffer[..length])?;
                stdout.flush()?;
                received += 1;
                if flags.receive_max.is_some_and(|max| received >= max) {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                return Ok(());
            }
            Err(error) => return Err(error).context("the connection broke"),
        }
    }
}

fn udp(flags: &Flags, peer: SocketAddr, patience: Duration) -> Result<()> {
    let any: SocketAddr = if peer.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0u16; 8], 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    // Connected, so that only the peer's answers arrive, and its refusals too.
    socket
        .connect(peer)
        .with_context(|| format!("cannot reach {peer}"))?;
    socket.set_read_timeout(Some(patience))?;
    let sending = socket.try_clone()?;
    std::thread::spawn(move || {
        let mut datagram = [0; 1472];
        let mut stdin = std::io::stdin().lock();
        while let Ok(length @ 1..) = stdin.read(&mut datagram) {
            // A refusal of the one before may be reported here; the reading side tells it.
            let _ = sending.send(&datagram[..length]);
        }
    });
    let mut buffer = vec![0; 65_535];
    let mut received = 0;
    let mut stdout = std::io::stdout().lock();
    while flags.receive_max.is_none_or(|max| received < max) {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                stdout.write_all(&buffer[..length])?;
                stdout.flush()?;
                received += 1;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                if received == 0 {
                    bail!("no answer from {peer} within {} s", patience.as_secs());
                }
                return Ok(());
            }
            Err(error) => return Err(error).with_context(|| format!("no answer from {peer}")),
        }
    }
    Ok(())
}
