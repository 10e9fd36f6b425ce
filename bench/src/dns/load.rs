//! The generator: many questions in flight from one thread, and latencies that count from when a question was due.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg, setsockopt, sockopt,
};
use std::io::{IoSlice, IoSliceMut};

/// Datagrams of one system call.
const BATCH: usize = 32;
const REPLY_BYTES: usize = 1232;
const HEADER_BYTES: usize = 12;
/// Of the socket, for answers that wait to be read.
const ROOM_BYTES: usize = 4 << 20;
/// A question without an answer for so long is lost.
const LOST: Duration = Duration::from_secs(2);
/// A generator that has not looked for so long was not running.
const AWAY: Duration = Duration::from_micros(300);
/// Of an open load: long enough for a p99 of its own, short enough that most of them hold no pause of the machine.
pub const SLICE: Duration = Duration::from_millis(50);

/// What is asked: questions in wire format, in turn. Where `unique` names a place, a number is written there each time.
pub struct Questions {
    pub wires: Vec<Vec<u8>>,
    /// First byte of eight digits that are different in every question.
    pub unique: Option<usize>,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// How late questions went out: what of the waiting is the generator's own, which was not running or had fallen behind.
    pub late_p99_us: f64,
    /// Of a hundred questions at a rate, those of which it is not known how long clients would have waited: the generator was not
    /// running while they were under way, or sent them with all that it had to make up for.
    pub unseen_percent: f64,
    /// p99 to p50 within a slice of an open load, in the middle one of those that were seen; `None` where none was.
    pub slice_p99_to_p50: Option<f64>,
    /// The p99 itself, of the middle one by that.
    pub slice_p99_us: Option<f64>,
    pub answered: u64,
    pub lost: u64,
    /// Answers with another code than the first.
    pub odd: u64,
}

/// How questions are paced.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// The next one when one is answered, so many at once: shows what a server can do.
    Closed(usize),
    /// So many per second whatever comes back: shows how long clients wait. A late start counts as waiting.
    Open(f64),
}

/// Asks one question after another for a while, and sleeps until each is answered, so that a server on the same CPU has it.
///
/// # Errors
/// When the socket fails.
pub fn one_at_a_time(
    server: SocketAddr,
    questions: &Questions,
    duration: Duration,
) -> io::Result<Sample> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(LOST))?;
    let mut nanos = Histogram::<u64>::new_with_max(10_000_000_000, 3).map_err(io::Error::other)?;
    let (mut sample, mut reply) = (Sample::default(), [0; REPLY_BYTES]);
    let begun = Instant::now();
    for wire in questions.wires.iter().cycle() {
        let sent = Instant::now();
        if sent - begun >= duration {
            break;
        }
        socket.send(wire)?;
        match socket.recv(&mut reply) {
            Ok(_) => nanos.saturating_record(sent.elapsed().as_nanos() as u64),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sample.lost += 1,
            Err(error) => return Err(error),
        }
    }
    let micros = |quantile| nanos.value_at_quantile(quantile) as f64 / 1000.0;
    sample.per_second = nanos.len() as f64 / begun.elapsed().as_secs_f64();
    sample.answered = nanos.len();
    (sample.p50_us, sample.p99_us) = (micros(0.5), micros(0.99));
    Ok(sample)
}

struct Flight {
    due: Instant,
    waiting: bool,
}

/// Asks for a while and counts.
///
/// # Errors
/// When the socket fails.
pub fn run(
    server: SocketAddr,
    questions: &Questions,
    pace: Pace,
    duration: Duration,
) -> io::Result<Sample> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    // Where it shares a CPU with the server, all answers may come before it reads one. Less room is given without the right to more.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &ROOM_BYTES)
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &ROOM_BYTES));
    let mut flights: Vec<Flight> = (0..=u16::MAX)
        .map(|_| Flight {
            due: Instant::now(),
            waiting: false,
        })
        .collect();
    let mut nanos = Histogram::<u64>::new_with_max(10_000_000_000, 3).map_err(io::Error::other)?;
    let mut late = nanos.clone();
    let mut slices = Slices::new(&nanos);
    let (begun, mut in_flight) = (Instant::now(), 0_usize);
    let (mut sent, mut lost, mut odd) = (0_u64, 0_u64, 0_u64);
    let (mut next_id, mut code) = (0_u16, None);
    let mut out: Vec<Vec<u8>> = (0..BATCH).map(|_| Vec::with_capacity(512)).collect();
    let mut inbox = Inbox::new();
    let mut swept = begun;
    let (mut looked, mut seen_from, mut unseen) = (begun, begun, 0_u64);
    loop {
        let now = Instant::now();
        let was_away = now - looked > AWAY;
        looked = now;
        let ending = now - begun >= duration;
        if ending && (in_flight == 0 || now - begun >= duration + LOST) {
            break;
        }
        let due = match pace {
            _ if ending => 0,
            Pace::Closed(window) => window.saturating_sub(in_flight),
            Pace::Open(rate) => {
                let by_now = ((now - begun).as_secs_f64() * rate) as u64;
                (by_now.saturating_sub(sent) as usize)
                    .min(usize::from(u16::MAX / 2).saturating_sub(in_flight))
            }
        };
        if matches!(pace, Pace::Open(_)) && (was_away || due > BATCH) {
            seen_from = now;
        }
        let mut ready = 0;
        for buffer in out.iter_mut().take(due.min(BATCH)) {
            let wire = &questions.wires[sent as usize % questions.wires.len()];
            buffer.clear();
            buffer.extend_from_slice(wire);
            while flights[usize::from(next_id)].waiting {
                next_id = next_id.wrapping_add(1);
            }
            buffer[..2].copy_from_slice(&next_id.to_be_bytes());
            if let Some(at) = questions.unique {
                let digits = format!("{sent:08}");
                buffer[at..at + 8].copy_from_slice(&digits.as_bytes()[digits.len() - 8..]);
            }
            let due = match pace {
                Pace::Closed(_) => now,
                Pace::Open(rate) => begun + Duration::from_secs_f64(sent as f64 / rate),
            };
            late.saturating_record(now.saturating_duration_since(due).as_nanos() as u64);
            flights[usize::from(next_id)] = Flight { due, waiting: true };
            next_id = next_id.wrapping_add(1);
            sent += 1;
            in_flight += 1;
            ready += 1;
            if matches!(pace, Pace::Open(_)) {
                // One by one: none waits for those behind it.
                send_one(&socket, buffer)?;
            }
        }
        if matches!(pace, Pace::Closed(_)) {
            send(&socket, &out[..ready])?;
        }
        let received = inbox.receive(&socket, |reply| {
            let id = usize::from(u16::from_be_bytes([reply[0], reply[1]]));
            if !std::mem::take(&mut flights[id].waiting) {
                return;
            }
            in_flight -= 1;
            let due = flights[id].due;
            if due < seen_from {
                unseen += 1;
            } else {
                let waited = due.elapsed().as_nanos() as u64;
                nanos.saturating_record(waited);
                slices.record(due - begun, waited);
            }
            odd += u64::from(*code.get_or_insert(reply[3] & 15) != reply[3] & 15);
        })?;
        if received == 0 && ready == 0 {
            if now - swept > LOST / 4 {
                swept = now;
                for flight in flights.iter_mut().filter(|flight| flight.waiting) {
                    if now.saturating_duration_since(flight.due) > LOST {
                        flight.waiting = false;
                        in_flight -= 1;
                        lost += 1;
                    }
                }
            }
            // Whoever else is to run on this CPU, as the upstream is, or a server that has all of them, runs now and not when this
            // thread's time is up, some milliseconds later.
            std::thread::yield_now();
        }
    }
    slices.end();
    let took = begun.elapsed().min(duration).as_secs_f64();
    let micros =
        |nanos: &Histogram<u64>, quantile| nanos.value_at_quantile(quantile) as f64 / 1000.0;
    let answered = nanos.len() + unseen;
    Ok(Sample {
        per_second: answered as f64 / took,
        p50_us: micros(&nanos, 0.5),
        p99_us: micros(&nanos, 0.99),
        late_p99_us: micros(&late, 0.99),
        unseen_percent: 100.0 * unseen as f64 / answered.max(1) as f64,
        slice_p99_us: slices.middle(|slice| slice.p99_us),
        slice_p99_to_p50: slices.middle(|slice| slice.p99_to_p50),
        answered,
        lost: lost + in_flight as u64,
        odd,
    })
}

/// Latencies of an open load slice by slice, by when questions were due.
struct Slices {
    nanos: Histogram<u64>,
    at: u128,
    ended: Vec<Slice>,
}

struct Slice {
    p99_us: f64,
    p99_to_p50: f64,
}

impl Slices {
    fn new(like: &Histogram<u64>) -> Self {
        Self {
            nanos: Histogram::new_from(like),
            at: 0,
            ended: Vec::new(),
        }
    }

    /// A question that was due `since` the beginning. What is answered after the first of the next slice counts there.
    fn record(&mut self, since: Duration, nanos: u64) {
        let at = since.as_nanos() / SLICE.as_nanos();
        if at > self.at {
            self.end();
            self.at = at;
        }
        self.nanos.saturating_record(nanos);
    }

    fn end(&mut self) {
        /// Fewer have no p99.
        const ANSWERS_MIN: u64 = 1000;
        if self.nanos.len() >= ANSWERS_MIN {
            let at = |quantile| self.nanos.value_at_quantile(quantile) as f64;
            self.ended.push(Slice {
                p99_us: at(0.99) / 1000.0,
                p99_to_p50: at(0.99) / at(0.5),
            });
        }
        self.nanos.reset();
    }

    /// Of the slices that had enough answers, the middle one by some number.
    fn middle(&self, number: impl Fn(&Slice) -> f64) -> Option<f64> {
        middle(self.ended.iter().map(number).collect())
    }
}

/// The middle one of some numbers; of an even count the upper one.
pub fn middle(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied()
}

/// Sends one without more work than that takes: what the generator spends is in the waiting times.
fn send_one(socket: &UdpSocket, wire: &[u8]) -> io::Result<()> {
    loop {
        match socket.send(wire) {
            Ok(_) => return Ok(()),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                // Nobody listens: that shows as loss.
                io::ErrorKind::ConnectionRefused => return Ok(()),
                _ => return Err(error),
            },
        }
    }
}

fn send(socket: &UdpSocket, wires: &[Vec<u8>]) -> io::Result<()> {
    let mut done = 0;
    while done < wires.len() {
        let slices: Vec<[IoSlice<'_>; 1]> = wires[done..]
            .iter()
            .map(|wire| [IoSlice::new(wire)])
            .collect();
        let none: Vec<Option<SockaddrIn>> = vec![None; slices.len()];
        let mut headers = MultiHeaders::<SockaddrIn>::preallocate(slices.len(), None);
        match sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices,
            &none,
            [],
            MsgFlags::empty(),
        ) {
            Ok(sent) => done += sent.count(),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // Nobody listens: that shows as loss.
            Err(Errno::ECONNREFUSED) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Where answers are read to.
struct Inbox {
    headers: MultiHeaders<SockaddrIn>,
    buffers: Vec<[u8; REPLY_BYTES]>,
}

impl Inbox {
    fn new() -> Self {
        Self {
            headers: MultiHeaders::preallocate(BATCH, None),
            buffers: vec![[0; REPLY_BYTES]; BATCH],
        }
    }

    /// Tells of each answer that is there.
    fn receive(&mut self, socket: &UdpSocket, mut each: impl FnMut(&[u8])) -> io::Result<usize> {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> = self
            .buffers
            .iter_mut()
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let (socket, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let messages = match recvmmsg(socket, &mut self.headers, &mut slices, flags, None) {
            Ok(messages) => messages,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        };
        let mut count = 0;
        for message in messages {
            count += 1;
            let reply = message.iovs().next().unwrap_or_default();
            if reply.len() >= HEADER_BYTES {
                each(reply);
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_that_was_hardly_seen_says_nothing() {
        let like = Histogram::new_with_max(10_000_000_000, 3).expect("bounds");
        let of = |answers: u64| {
            let mut slices = Slices::new(&like);
            for i in 0..answers {
                slices.record(SLICE / 2, if i % 50 == 0 { 90_000 } else { 10_000 });
            }
            slices.end();
            slices.middle(|slice| slice.p99_to_p50)
        };
        assert_eq!(of(999), None);
        assert!(of(1000).is_some_and(|ratio| (8.9..9.1).contains(&ratio)));
    }
}
