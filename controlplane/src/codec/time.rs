//! Times as the API writes them: RFC 3339 in UTC, with seconds (`Time`) or microseconds (`MicroTime`).

use jiff::Timestamp;

/// The canonical form of a `Time`; None when it does not parse.
pub fn seconds(text: &str) -> Option<String> {
    parse(text).map(render_seconds)
}

/// The canonical form of a `MicroTime`.
pub fn micros(text: &str) -> Option<String> {
    parse(text).map(render_micros)
}

pub fn parse(text: &str) -> Option<Timestamp> {
    // RFC 3339 has a full date, `T`, and an offset: jiff takes more than that.
    let bytes = text.as_bytes();
    if bytes.len() < 20 || bytes[10] != b'T' || text.contains('[') {
        return None;
    }
    text.parse().ok()
}

pub fn render_seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub fn render_micros(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_kept_in_utc_with_their_precision() {
        assert_eq!(
            seconds("2026-01-02T03:04:05Z").as_deref(),
            Some("2026-01-02T03:04:05Z")
        );
        assert_eq!(
            seconds("2026-01-02T03:04:05.999+02:00").as_deref(),
            Some("2026-01-02T01:04:05Z")
        );
        assert_eq!(
            micros("2026-01-02T03:04:05.1234567Z").as_deref(),
            Some("2026-01-02T03:04:05.123456Z")
        );
        assert_eq!(
            micros("2026-01-02T03:04:05Z").as_deref(),
            Some("2026-01-02T03:04:05.000000Z")
        );
    }

    #[test]
    fn what_is_not_rfc_3339_is_refused() {
        for text in [
            "",
            "2026-01-02",
            "2026-01-02 03:04:05Z",
            "2026-13-02T03:04:05Z",
            "2026-01-02T03:04:05",
            "now",
        ] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
