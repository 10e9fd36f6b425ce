//! Medians and how sure of them one may be: the only statistics that a shared, noisy machine allows.

use serde::{Deserialize, Serialize};

/// Chance that is left for the true median to lie outside of the interval.
const DOUBT: f64 = 0.05;

/// The middle of some rounds, and an interval that holds the median of all rounds that could have been.
///
/// The interval is the narrowest between the k-th lowest and the k-th highest value that holds the median with 95 % confidence,
/// whatever the values' distribution (binomial order statistics: Conover, Practical Nonparametric Statistics, 3.2). Five rounds or
/// fewer cannot be that sure: all of them are the interval then.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Spread {
    /// The spread of `values`; `None` when there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let outer = outside(sorted.len());
        let low = *sorted.get(outer)?;
        let high = sorted[sorted.len() - 1 - outer];
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            (sorted[middle - 1] + sorted[middle]) / 2.0
        };
        Some(Self { median, low, high })
    }

    /// Width of the interval, as a share of the median.
    pub fn relative_width(&self) -> f64 {
        if self.median == 0.0 {
            0.0
        } else {
            (self.high - self.low) / self.median
        }
    }

    /// The same in another unit.
    pub fn times(self, factor: f64) -> Self {
        Self {
            median: self.median * factor,
            low: self.low * factor,
            high: self.high * factor,
        }
    }

    /// Whether both intervals have a value in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.low <= other.high && other.low <= self.high
    }
}

/// Values of so many that may be left out at each end, and the interval still holds the median.
fn outside(count: usize) -> usize {
    let mut beyond = 0.0;
    // The chance that exactly i of all values lie below the median.
    let mut chance = 0.5_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    for outer in 0..count / 2 {
        beyond += chance;
        chance *= (count - outer) as f64 / (outer + 1) as f64;
        // The interval from value `outer + 1` on misses it in these and the next cases, at both ends.
        if 2.0 * (beyond + chance) > DOUBT {
            return outer;
        }
    }
    0
}

/// How a cost grows with size: the exponent of the power law through the points, by least squares over their logarithms. 0 is flat,
/// 1 is proportional. `None` with fewer than two sizes.
pub fn growth(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<(f64, f64)> = points
        .iter()
        .filter(|(size, cost)| *size > 0.0 && *cost > 0.0)
        .map(|(size, cost)| (size.ln(), cost.ln()))
        .collect();
    let count = logs.len() as f64;
    let mean = |value: fn(&(f64, f64)) -> f64| logs.iter().map(value).sum::<f64>() / count;
    let (mean_size, mean_cost) = (mean(|point| point.0), mean(|point| point.1));
    let variance: f64 = logs
        .iter()
        .map(|(size, _)| (size - mean_size).powi(2))
        .sum();
    let covariance: f64 = logs
        .iter()
        .map(|(size, cost)| (size - mean_size) * (cost - mean_cost))
        .sum();
    (variance > 0.0).then(|| covariance / variance)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64, low: f64, high: f64) -> Option<Spread> {
        Some(Spread { median, low, high })
    }

    #[test]
    fn median_of_odd_even_and_no_values() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), spread(2.0, 1.0, 3.0));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]), spread(2.5, 1.0, 4.0));
        assert_eq!(Spread::of([]), None);
    }

    /// Table A3 of Conover's book, and what follows from the binomial distribution.
    #[test]
    fn one_wild_round_of_nine_is_outside_of_the_interval() {
        let rounds = |count: usize| (1..=count).map(|value| value as f64);
        assert_eq!(Spread::of(rounds(5)), spread(3.0, 1.0, 5.0));
        assert_eq!(Spread::of(rounds(8)), spread(4.5, 1.0, 8.0));
        assert_eq!(Spread::of(rounds(9)), spread(5.0, 2.0, 8.0));
        assert_eq!(Spread::of(rounds(15)), spread(8.0, 4.0, 12.0));
        assert_eq!(Spread::of(rounds(20)), spread(10.5, 6.0, 15.0));
    }

    #[test]
    fn growth_is_the_power_of_the_size() {
        let of = |cost: fn(f64) -> f64| {
            let points: Vec<_> = [10.0, 1e3, 1e5].map(|size| (size, cost(size))).to_vec();
            growth(&points).expect("three sizes")
        };
        assert!(of(|_| 7.0).abs() < 1e-9);
        assert!((of(|size| 3.0 * size) - 1.0).abs() < 1e-9);
        assert!((of(f64::sqrt) - 0.5).abs() < 1e-9);
        assert_eq!(growth(&[(10.0, 1.0)]), None);
    }
}
