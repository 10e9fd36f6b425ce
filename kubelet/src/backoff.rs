//! Quick: how fast a broken watch is tried again.

use std::time::Duration;

/// A Quick back-off starts at 50 ms and doubles up to 2 s: an API server that restarts is found again at once, and one
/// that stays away is asked once in two seconds per watch. kube's default starts at 800 ms and goes to 30 s.
#[derive(Debug, Clone, Default)]
pub struct Quick {
    tries: u32,
}

impl Quick {
    pub fn wait(&mut self) -> Duration {
        let wait = Duration::from_millis(50 << self.tries.min(6)).min(Duration::from_secs(2));
        self.tries += 1;
        wait
    }

    pub fn clear(&mut self) {
        self.tries = 0;
    }
}

impl Iterator for Quick {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.wait())
    }
}

impl kube::runtime::utils::Backoff for Quick {
    fn reset(&mut self) {
        self.clear();
    }
}
