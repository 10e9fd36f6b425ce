//! One reader beside a load: how long it waits for an object, and for what takes nobody any work.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;

use super::endpoint::Caller;

/// What one reader has seen, in microseconds.
pub struct Beside {
    /// Of one object.
    pub reads: Histogram<u64>,
    /// Of `/version` on the same connection: all that a read is but for access and the store.
    pub version: Histogram<u64>,
    /// Of a byte between two threads of this program: what threads that are woken wait for on this machine, whoever serves.
    pub bare: Histogram<u64>,
}

/// Reads `path`, `/version`, and nothing in turn. From a thread of its own: what reads wait for is to be the server, not the clients
/// that write.
pub fn read_beside(caller: &Caller, path: &str, until: Instant) -> Result<Beside> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut echo = Echo::start().context("two threads that talk to each other")?;
    let mut seen = Beside {
        reads: Histogram::new(3)?,
        version: Histogram::new(3)?,
        bare: Histogram::new(3)?,
    };
    while Instant::now() < until {
        for (path, times) in [(path, &mut seen.reads), ("/version", &mut seen.version)] {
            let answer = runtime.block_on(caller.get(path))?;
            times.record(u64::try_from(answer.took.as_micros())?)?;
        }
        let began = Instant::now();
        echo.ask()?;
        let took = began.elapsed();
        seen.bare.record(u64::try_from(took.as_micros())?)?;
    }
    Ok(seen)
}

/// A thread that sends each byte back. It ends with this value.
struct Echo(TcpStream);

impl Echo {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let asks = TcpStream::connect(listener.local_addr()?)?;
        let (mut answers, _) = listener.accept()?;
        for stream in [&asks, &answers] {
            stream.set_nodelay(true)?;
        }
        thread::Builder::new().name("echo".into()).spawn(move || {
            let mut byte = [0];
            while answers.read_exact(&mut byte).is_ok() && answers.write_all(&byte).is_ok() {}
        })?;
        Ok(Self(asks))
    }

    fn ask(&mut self) -> Result<()> {
        self.0.write_all(&[0])?;
        Ok(self.0.read_exact(&mut [0])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_comes_back_as_often_as_it_is_sent() {
        let mut echo = Echo::start().expect("a thread");
        for _ in 0..3 {
            echo.ask().expect("an answer");
        }
    }
}
