//! Several connections of one client, and two ways to load them.
//!
//! Closed: each connection asks again as soon as it has its answer. Open: requests come in at a fixed rate, whatever became of those
//! before, and wait for a free connection; a latency counts from when its request came in, so a stall of the server is in the
//! latency of every request that fell into it (no coordinated omission), and requests that still wait at the end count with their
//! age.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::{Clock, HTTP_CONNECTIONS, Latencies, STALL, Sample, connect};

/// What is asked, and how long its answer is.
pub(super) struct Exchange {
    pub request: &'static [u8],
    pub answer_bytes: usize,
}

pub(super) const BYTE: Exchange = Exchange {
    request: &[1],
    answer_bytes: 1,
};
pub(super) const HTTP: Exchange = Exchange {
    request: b"GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: keelway-bench\r\nAccept: */*\r\n\r\n",
    answer_bytes: super::server::HTTP_HEAD.len() + super::server::HTTP_BODY_BYTES,
};

struct Connection {
    stream: TcpStream,
    /// When the request came in that is on its way.
    asked: Option<Instant>,
    missing: usize,
}

pub(super) fn run(
    target: SocketAddr,
    duration: Duration,
    exchange: &Exchange,
    rate: Option<f64>,
) -> io::Result<Sample> {
    let mut connections = (0..HTTP_CONNECTIONS)
        .map(|_| {
            let stream = connect(target)?;
            stream.set_nonblocking(true)?;
            Ok(Connection {
                stream,
                asked: None,
                missing: 0,
            })
        })
        .collect::<io::Result<Vec<_>>>()?;
    // Requests are due to the microsecond; a timer's usual slack is fifty.
    nix::sys::prctl::set_timerslack(1)?;
    let mut latencies = Latencies::new()?;
    let mut buffer = vec![0; exchange.answer_bytes];
    let mut waiting: VecDeque<Instant> = VecDeque::new();
    let clock = Clock::start(duration);
    let gap = rate.map(|rate| Duration::from_secs_f64(1.0 / rate));
    let mut due = Instant::now();
    let mut last_answer = due;
    loop {
        let now = Instant::now();
        if now >= clock.end {
            break;
        }
        if let Some(gap) = gap {
            while due <= now {
                waiting.push_back(due);
                due += gap;
            }
        }
        for connection in connections.iter_mut().filter(|free| free.asked.is_none()) {
            let asked = match gap {
                None => now,
                Some(_) => match waiting.pop_front() {
                    Some(asked) => asked,
                    None => break,
                },
            };
            // Nothing else is on its way, so the socket takes it whole.
            connection.stream.write_all(exchange.request)?;
            connection.asked = Some(asked);
            connection.missing = exchange.answer_bytes;
        }
        let patience = match gap {
            None => STALL,
            Some(_) => due.saturating_duration_since(Instant::now()),
        };
        wait(&connections, patience)?;
        for connection in connections.iter_mut().filter(|busy| busy.asked.is_some()) {
            match connection.stream.read(&mut buffer[..connection.missing]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => connection.missing -= bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            }
            if connection.missing == 0
                && let Some(asked) = connection.asked.take()
            {
                last_answer = Instant::now();
                if asked >= clock.warm {
                    latencies.record(last_answer - asked);
                }
            }
        }
        let unanswered = connections.iter().any(|busy| busy.asked.is_some());
        if unanswered && last_answer.elapsed() > STALL {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    let sample = latencies.sample(clock.end - clock.warm);
    if gap.is_some() {
        let busy = connections.iter().filter_map(|busy| busy.asked);
        for asked in busy.chain(waiting).filter(|asked| *asked >= clock.warm) {
            latencies.record(clock.end.saturating_duration_since(asked));
        }
    }
    Ok(Sample {
        per_second: sample.per_second,
        ..latencies.sample(clock.end - clock.warm)
    })
}

fn wait(connections: &[Connection], patience: Duration) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> = connections
        .iter()
        .filter(|busy| busy.asked.is_some())
        .map(|busy| PollFd::new(busy.stream.as_fd(), PollFlags::POLLIN))
        .collect();
    match ppoll(&mut fds, Some(TimeSpec::from_duration(patience)), None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    use super::*;

    /// Answers bytes, and stalls once for 50 ms.
    fn stalling_server() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            let begun = Instant::now();
            let mut streams: Vec<TcpStream> = (0..HTTP_CONNECTIONS)
                .map(|_| listener.accept().expect("a client").0)
                .collect();
            for stream in &streams {
                stream.set_nonblocking(true).expect("non-blocking");
            }
            let mut stalled = false;
            while begun.elapsed() < Duration::from_secs(2) {
                if !stalled && begun.elapsed() > Duration::from_millis(100) {
                    stalled = true;
                    // The stall is what the test is about.
                    thread::park_timeout(Duration::from_millis(50));
                }
                let mut byte = [0];
                for stream in &mut streams {
                    match stream.read(&mut byte) {
                        Ok(0) => return,
                        Ok(_) => stream.write_all(&byte).expect("an answer"),
                        Err(_) => thread::yield_now(),
                    }
                }
            }
        });
        address
    }

    #[test]
    fn a_stall_is_in_the_latency_of_all_requests_that_fell_into_it() {
        let duration = Duration::from_millis(250);
        let sample = run(stalling_server(), duration, &BYTE, Some(2000.0)).expect("a sample");
        // Of 500 requests 100 fell into the stall, in each of which one more millisecond had passed. A client that waits for
        // answers would have seen it in one request of each connection.
        assert!(sample.p99_us > 30_000.0, "{sample:?}");
    }
}
