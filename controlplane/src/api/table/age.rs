//! Ages as kubectl prints them.

use jiff::Timestamp;

/// The time since `timestamp` (RFC 3339) in at most two units; `<unknown>` when there is none.
pub fn age(timestamp: &str) -> String {
    match timestamp.parse::<Timestamp>() {
        Ok(at) => human_duration(Timestamp::now().as_second() - at.as_second()),
        Err(_) => "<unknown>".to_owned(),
    }
}

/// A duration in at most two units, with fewer the longer it is (upstream's `HumanDuration`).
pub fn human_duration(duration_s: i64) -> String {
    let two = |large: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{large}{unit}")
        } else {
            format!("{large}{unit}{small}{small_unit}")
        }
    };
    let (minutes, hours) = (duration_s / 60, duration_s / 3600);
    let (days, years) = (hours / 24, hours / 24 / 365);
    match duration_s {
        ..-1 => "<invalid>".to_owned(),
        -1 => "0s".to_owned(),
        0..120 => format!("{duration_s}s"),
        _ if minutes < 10 => two(minutes, "m", duration_s % 60, "s"),
        _ if minutes < 180 => format!("{minutes}m"),
        _ if hours < 8 => two(hours, "h", minutes % 60, "m"),
        _ if hours < 48 => format!("{hours}h"),
        _ if hours < 24 * 8 => two(days, "d", hours % 24, "h"),
        _ if days < 365 * 2 => format!("{days}d"),
        _ if days < 365 * 8 => two(years, "y", days % 365, "d"),
        _ => format!("{years}y"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_lose_precision_as_they_grow() {
        let table = [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (3 * 3600 - 1, "179m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 61, "3h1m"),
            (8 * 3600 + 61, "8h"),
            (48 * 3600, "2d"),
            (49 * 3600, "2d1h"),
            (8 * 86400, "8d"),
            (730 * 86400, "2y"),
            (731 * 86400, "2y1d"),
        ];
        for (seconds, text) in table {
            assert_eq!(human_duration(seconds), text);
        }
    }
}
