//! Chance that can be had again.

use std::time::SystemTime;

/// Numbers that look random (xorshift64*, Vigna 2016), the same for the same seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// For how many seconds a soak goes on, and its seed: `KEELWAY_SOAK_S` and `KEELWAY_SOAK_SEED`, else so many and the clock's. Printed, so
/// that a run can be had again.
pub fn soak(seconds: u64) -> (u64, u64) {
    let seconds = number("KEELWAY_SOAK_S").unwrap_or(seconds);
    let seed = number("KEELWAY_SOAK_SEED").unwrap_or_else(|| {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |since| since.as_nanos() as u64)
    });
    println!("KEELWAY_SOAK_S={seconds} KEELWAY_SOAK_SEED={seed}");
    (seconds, seed)
}

/// The number that an environment variable holds, if it does.
pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
