//! Quantities (`500m`, `1Gi`, `1e3`): the canonical form in which the API server keeps them.

/// What does not parse; the wording is what clients know.
pub const INVALID: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

const NANO_DIGITS: i32 = 9;
const NANOS: i128 = 1_000_000_000;
/// Larger values are capped, as Go's int64 caps them.
const NANOS_MAX: i128 = i64::MAX as i128 * NANOS;
const BINARY: &[&str] = &["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
/// From 10^-9 in steps of 10^3.
const DECIMAL: &[&str] = &["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Binary,
    Decimal,
    Exponent,
}

/// An amount with the format it was written in; amounts compare and add whatever their formats.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    pub const ZERO: Self = Self {
        nanos: 0,
        format: Format::Decimal,
    };

    pub fn parse(text: &str) -> Option<Self> {
        parse(text).map(|(nanos, format)| Self { nanos, format })
    }

    /// A quantity in JSON: a string, or a number as clients may write it.
    pub fn of(value: &serde_json::Value) -> Option<Self> {
        match value {
            serde_json::Value::String(text) => Self::parse(text),
            serde_json::Value::Number(number) => Self::parse(&number.to_string()),
            _ => None,
        }
    }

    pub fn count(count: i64) -> Self {
        Self {
            nanos: i128::from(count) * NANOS,
            format: Format::Decimal,
        }
    }

    pub fn is_negative(self) -> bool {
        self.nanos < 0
    }

    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }

    pub fn is_whole(self) -> bool {
        self.nanos % NANOS == 0
    }

    /// What this is of `other`; None of nothing.
    pub fn ratio(self, other: Self) -> Option<f64> {
        (other.nanos != 0).then(|| self.nanos as f64 / other.nanos as f64)
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl std::ops::Add for Quantity {
    type Output = Self;

    /// In the format of the first that is not zero.
    fn add(self, other: Self) -> Self {
        let format = if self.nanos == 0 {
            other.format
        } else {
            self.format
        };
        Self {
            nanos: self.nanos.saturating_add(other.nanos),
            format,
        }
    }
}

impl std::ops::Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            nanos: self.nanos.saturating_sub(other.nanos),
            format: self.format,
        }
    }
}

impl std::fmt::Display for Quantity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&render(self.nanos, self.format))
    }
}

/// The canonical form: the largest suffix that leaves an integer, and no more than nine decimal places (rounded up).
pub fn canonical(text: &str) -> Option<String> {
    let (nanos, format) = parse(text)?;
    Some(render(nanos, format))
}

fn parse(text: &str) -> Option<(i128, Format)> {
    let (negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let split = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(split);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let (format, binary, decimal) = interpret(suffix)?;
    let magnitude = magnitude(whole, fraction, binary, decimal);
    Some((if negative { -magnitude } else { magnitude }, format))
}

/// The format of a suffix, with its power of two and its power of ten.
fn interpret(suffix: &str) -> Option<(Format, u32, i32)> {
    if let Some(i) = BINARY.iter().position(|s| *s == suffix) {
        return Some((Format::Binary, 10 * (i as u32 + 1), 0));
    }
    if let Some(i) = DECIMAL.iter().position(|s| *s == suffix) {
        return Some((Format::Decimal, 0, 3 * i as i32 - NANO_DIGITS));
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((Format::Exponent, 0, exponent.parse().ok()?))
}

/// The absolute value in nanos, rounded up and capped.
fn magnitude(whole: &str, fraction: &str, binary: u32, decimal: i32) -> i128 {
    // 38 significant digits fill an i128; what lies beyond 30 can only round up.
    let digits: String = whole
        .chars()
        .chain(fraction.chars())
        .skip_while(|c| *c == '0')
        .collect();
    let kept = digits.len().min(24);
    let dropped_nonzero = digits[kept..].bytes().any(|b| b != b'0');
    let mut value: i128 = digits[..kept].parse().unwrap_or(0);
    if value == 0 {
        return 0;
    }
    // value * 10^scale * 2^binary nanos
    let scale = i64::from(decimal) + (digits.len() - kept) as i64 - fraction.len() as i64
        + i64::from(NANO_DIGITS);
    let mut up = dropped_nonzero;
    for _ in 0..binary {
        value = match value.checked_mul(2) {
            Some(doubled) => doubled,
            // Keeps the magnitude; such values are far beyond the cap unless they have a long fraction.
            None => return NANOS_MAX,
        };
    }
    if scale >= 0 {
        for _ in 0..scale {
            value = match value.checked_mul(10) {
                Some(scaled) if scaled <= NANOS_MAX => scaled,
                _ => return NANOS_MAX,
            };
        }
    } else {
        for _ in 0..-scale {
            if value == 0 {
                break;
            }
            up |= value % 10 != 0;
            value /= 10;
        }
    }
    (value + i128::from(up)).min(NANOS_MAX)
}

fn render(nanos: i128, format: Format) -> String {
    if nanos == 0 {
        return "0".to_owned();
    }
    let whole = nanos % NANOS == 0;
    if format == Format::Binary && whole && nanos.abs() >= 1024 * NANOS {
        let (mut value, mut power) = (nanos / NANOS, 0);
        while value % 1024 == 0 && power < BINARY.len() {
            value /= 1024;
            power += 1;
        }
        let suffix = if power == 0 { "" } else { BINARY[power - 1] };
        return format!("{value}{suffix}");
    }
    let (mut value, mut step) = (nanos, 0);
    while value % 1000 == 0 && step + 1 < DECIMAL.len() {
        value /= 1000;
        step += 1;
    }
    match format {
        Format::Exponent => match 3 * step as i32 - NANO_DIGITS {
            0 => value.to_string(),
            exponent => format!("{value}e{exponent}"),
        },
        _ => format!("{value}{}", DECIMAL[step]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_add_and_compare_across_formats() {
        let of = |text: &str| Quantity::parse(text).expect("a quantity");
        assert_eq!((of("500m") + of("1.5")).to_string(), "2");
        assert_eq!((of("1Gi") + of("512Mi")).to_string(), "1536Mi");
        assert_eq!((Quantity::ZERO + of("1Gi")).to_string(), "1Gi");
        assert!(of("1Gi") > of("1G") && of("1000m") == Quantity::count(1));
        assert!((of("1") - of("2")).is_negative());
        assert_eq!(of("3").ratio(of("2")), Some(1.5));
    }

    #[test]
    fn canonical_forms_are_those_of_upstream() {
        for (given, wanted) in [
            ("0", "0"),
            ("0m", "0"),
            ("1", "1"),
            ("0.5", "500m"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("1.5", "1500m"),
            ("1024Mi", "1Gi"),
            ("1Gi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("1000", "1k"),
            ("1234", "1234"),
            ("128974848", "128974848"),
            ("129e6", "129e6"),
            ("129M", "129M"),
            ("1e3", "1e3"),
            ("1E", "1E"),
            ("100Ki", "100Ki"),
            ("0.5Ki", "512"),
            ("1023Ki", "1023Ki"),
            ("0.0000000001", "1n"),
            ("1.0000000001", "1000000001n"),
            ("-1.5", "-1500m"),
            ("+2", "2"),
            (".5", "500m"),
            ("5.", "5"),
            ("99999999999999999999", "9223372036854775807"),
            ("1e100000", "9223372036854775807"),
            ("0.1Gi", "107374182400m"),
        ] {
            let got = canonical(given);
            // The cap of an exponent keeps its format; its digits are what counts.
            assert_eq!(got.as_deref(), Some(wanted), "{given}");
        }
    }

    #[test]
    fn canonical_is_a_fixed_point() {
        for given in ["0.123456789", "3Ki", "7e-3", "12345k", "1.1Ti"] {
            let once = canonical(given).unwrap();
            assert_eq!(canonical(&once).as_ref(), Some(&once), "{given}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for given in [
            "", "-", "abc", "1x", "1.2.3", "1e", "1e+", "1 Gi", "1Gib", "e3", ".", "1ki", "--1",
        ] {
            assert_eq!(canonical(given), None, "{given}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken_or_refused_without_panic(text in "[-+]?[0-9.]{0,60}[a-zA-Z0-9+-]{0,8}") {
            let _ = canonical(&text);
        }
    }
}
