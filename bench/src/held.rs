//! Figures that the project is held to.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::stats::Spread;

/// A figure with its target, and whether it meets it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Held {
    pub name: String,
    pub target: String,
    pub figure: f64,
    /// How sure the figure is; absent where it is from one measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
    pub ok: bool,
}

impl Held {
    /// A figure that must not be below a limit.
    pub fn at_least(name: impl Into<String>, limit: f64, spread: Spread) -> Self {
        Self {
            name: name.into(),
            target: format!(">={limit}"),
            figure: spread.median,
            spread: Some(spread),
            ok: spread.median >= limit,
        }
    }

    /// A figure that must be below a limit; the unit is for people.
    pub fn below(name: impl Into<String>, limit: f64, unit: &str, spread: Spread) -> Self {
        Self {
            name: name.into(),
            target: format!("<{limit}{unit}"),
            figure: spread.median,
            spread: Some(spread),
            ok: spread.median < limit,
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "HELD {} target={} figure={:.3} ",
            self.name, self.target, self.figure
        )?;
        if let Some(spread) = self.spread {
            write!(f, "spread={:.3}..{:.3} ", spread.low, spread.high)?;
        }
        f.write_str(if self.ok { "ok" } else { "MISS" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_is_missed_says_so() {
        let spread = |median| Spread {
            median,
            low: median - 0.01,
            high: median + 0.01,
        };
        assert_eq!(
            Held::at_least("a", 0.98, spread(0.97)).to_string(),
            "HELD a target=>=0.98 figure=0.970 spread=0.960..0.980 MISS"
        );
        assert_eq!(
            Held::below("b", 5.0, "ms", spread(0.5)).to_string(),
            "HELD b target=<5ms figure=0.500 spread=0.490..0.510 ok"
        );
    }
}
