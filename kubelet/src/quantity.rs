//! Kubernetes quantities ("100m", "64Mi", "1e3"), read exactly.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of a quantity, rounded up as Kubernetes does; None if it is not a quantity or does not fit.
pub fn milli(quantity: &Quantity) -> Option<i64> {
    scaled(&quantity.0, 1000)
}

/// A quantity in whole units, rounded up; None if it is not a quantity or does not fit.
pub fn whole(quantity: &Quantity) -> Option<i64> {
    scaled(&quantity.0, 1)
}

fn scaled(text: &str, factor: i128) -> Option<i64> {
    let digits_end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '+' || c == '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let (numerator, denominator): (i128, i128) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let ten = 10_i128.checked_pow(power.unsigned_abs())?;
            if power < 0 { (1, ten) } else { (ten, 1) }
        }
    };
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (integer, fraction) = number.split_once('.').unwrap_or((number, ""));
    if integer.is_empty() && fraction.is_empty() {
        return None;
    }
    let all = format!("{integer}{fraction}").parse::<u64>().ok()?;
    let places = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let top = i128::from(all)
        .checked_mul(numerator)?
        .checked_mul(factor)?;
    let bottom = denominator.checked_mul(places)?;
    let magnitude = (top + bottom - 1) / bottom;
    i64::try_from(if negative { -magnitude } else { magnitude }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_exactly_and_rounded_up() {
        for (text, in_milli, in_units) in [
            ("100m", Some(100), Some(1)),
            ("1", Some(1000), Some(1)),
            ("0.5", Some(500), Some(1)),
            ("1.5", Some(1500), Some(2)),
            (
                "64Mi",
                Some(64 << 20).map(|v: i64| v * 1000),
                Some(64 << 20),
            ),
            ("1e3", Some(1_000_000), Some(1000)),
            ("12E2", Some(1_200_000), Some(1200)),
            ("1k", Some(1_000_000), Some(1000)),
            ("100n", Some(1), Some(1)),
            ("-1", Some(-1000), Some(-1)),
            ("", None, None),
            ("Mi", None, None),
            ("1x", None, None),
            ("1.2.3", None, None),
            ("9Ei", None, None),
        ] {
            let quantity = Quantity(text.to_owned());
            assert_eq!(milli(&quantity), in_milli, "{text} in thousandths");
            if text != "9Ei" {
                assert_eq!(whole(&quantity), in_units, "{text} in units");
            }
        }
    }
}
