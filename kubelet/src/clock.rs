//! Clock: where the kubelet takes the time of day from, so that tests can drive it.

use jiff::Timestamp;

/// A Clock tells the time of day.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}
