//! Amounts of resources: what nodes offer and pods ask for.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// What a container without a request is taken to use when nodes are compared (not when it is checked whether it fits).
const DEFAULT_CPU_MILLI: i64 = 100;
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

pub const CPU: &str = "cpu";
pub const MEMORY: &str = "memory";
pub const PODS: &str = "pods";

/// Amounts by resource name: thousandths of a CPU for `cpu`, whole units (bytes, pieces) for all else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amounts(BTreeMap<String, i64>);

impl Amounts {
    pub fn of(quantities: Option<&BTreeMap<String, Quantity>>) -> Self {
        let amount = |(name, quantity): (&String, &Quantity)| {
            let milli = parse_milli(&quantity.0)?;
            let amount = if name == CPU {
                milli
            } else {
                milli.div_euclid(1000) + i128::from(milli.rem_euclid(1000) > 0)
            };
            Some((name.clone(), i64::try_from(amount).unwrap_or(i64::MAX)))
        };
        Self(
            quantities
                .into_iter()
                .flatten()
                .filter_map(amount)
                .collect(),
        )
    }

    pub fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    pub fn set(&mut self, name: &str, amount: i64) {
        self.0.insert(name.into(), amount);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, i64)> {
        self.0.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    pub fn add(&mut self, other: &Amounts) {
        for (name, amount) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*amount);
        }
    }

    pub fn subtract(&mut self, other: &Amounts) {
        for (name, amount) in &other.0 {
            if let Some(sum) = self.0.get_mut(name) {
                *sum -= amount;
            }
        }
    }

    fn at_least(&mut self, other: &Amounts) {
        for (name, amount) in &other.0 {
            let own = self.0.entry(name.clone()).or_default();
            *own = (*own).max(*amount);
        }
    }
}

/// A quantity in thousandths; None when it is not one.
pub fn parse_milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-')))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    // "1e3": the exponent is cut off together with the suffix above.
    let (multiplier, divisor): (i128, i128) = match suffix {
        "" => (1000, 1),
        "n" => (1, 1_000_000),
        "u" => (1, 1000),
        "m" => (1, 1),
        "k" => (1_000_000, 1),
        "M" => (1_000_000_000, 1),
        "G" => (1_000_000_000_000, 1),
        "T" => (1_000_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000_000, 1),
        "Ki" => (1000 << 10, 1),
        "Mi" => (1000 << 20, 1),
        "Gi" => (1000 << 30, 1),
        "Ti" => (1000 << 40, 1),
        "Pi" => (1000 << 50, 1),
        "Ei" => (1000 << 60, 1),
        exponent => {
            let power: u32 = exponent
                .strip_prefix(['e', 'E'])?
                .trim_start_matches('+')
                .parse()
                .ok()?;
            (10i128.checked_pow(power)?.checked_mul(1000)?, 1)
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let negative = whole.starts_with('-');
    let digits = whole.trim_start_matches(['+', '-']);
    if digits.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: i128 = if digits.is_empty() {
        0
    } else {
        digits.parse().ok()?
    };
    let fraction = &fraction[..fraction.len().min(9)];
    let scale = 10i128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: i128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().ok()?
    };
    let scaled = whole
        .checked_mul(scale)?
        .checked_add(fraction)?
        .checked_mul(multiplier)?;
    // Rounded up: half a unit must not count as nothing.
    let divisor = scale * divisor;
    let value = scaled.div_euclid(divisor) + i128::from(scaled.rem_euclid(divisor) > 0);
    Some(if negative { -value } else { value })
}

fn requests(container: &Container) -> Amounts {
    let resources = container.resources.as_ref();
    let mut amounts = Amounts::of(resources.and_then(|resources| resources.requests.as_ref()));
    // A limit without a request is a request too.
    for (name, limit) in Amounts::of(resources.and_then(|resources| resources.limits.as_ref())).0 {
        amounts.0.entry(name).or_insert(limit);
    }
    amounts
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// What a pod needs of a node: its containers together, or its largest init container with the sidecars started before it,
/// whichever is more; and one of the node's pod places.
pub fn needs(pod: &Pod) -> Amounts {
    let mut total = sum(pod, requests);
    total.set(PODS, 1);
    total
}

/// The same with a default for each container that asks for nothing, so that such pods spread too.
pub fn likely_use(pod: &Pod) -> (i64, i64) {
    let amounts = sum(pod, |container| {
        let mut amounts = requests(container);
        amounts.0.entry(CPU.into()).or_insert(DEFAULT_CPU_MILLI);
        amounts
            .0
            .entry(MEMORY.into())
            .or_insert(DEFAULT_MEMORY_BYTES);
        amounts
    });
    (amounts.get(CPU), amounts.get(MEMORY))
}

fn sum(pod: &Pod, requests: impl Fn(&Container) -> Amounts) -> Amounts {
    let Some(spec) = pod.spec.as_ref() else {
        return Amounts::default();
    };
    let mut total = Amounts::default();
    for container in &spec.containers {
        total.add(&requests(container));
    }
    let mut sidecars = Amounts::default();
    let mut init_peak = Amounts::default();
    for container in spec.init_containers.iter().flatten() {
        if is_sidecar(container) {
            sidecars.add(&requests(container));
            init_peak.at_least(&sidecars);
        } else {
            let mut with_sidecars = sidecars.clone();
            with_sidecars.add(&requests(container));
            init_peak.at_least(&with_sidecars);
        }
    }
    total.add(&sidecars);
    total.at_least(&init_peak);
    // Requests of the pod as a whole stand above those of its containers.
    let whole = spec
        .resources
        .as_ref()
        .and_then(|resources| resources.requests.as_ref());
    for (name, amount) in Amounts::of(whole).0 {
        total.0.insert(name, amount);
    }
    total.add(&Amounts::of(spec.overhead.as_ref()));
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn quantities_are_read_as_the_api_writes_them() {
        for (text, expected) in [
            ("1", Some(1000)),
            ("100m", Some(100)),
            ("0.5", Some(500)),
            (".5", Some(500)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("128Mi", Some(134_217_728_000)),
            ("1e3", Some(1_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("2k", Some(2_000_000)),
            ("1n", Some(1)),
            ("-1", Some(-1000)),
            ("", None),
            ("Gi", None),
            ("1Zi", None),
            ("abc", None),
        ] {
            assert_eq!(parse_milli(text), expected, "{text:?}");
        }
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"spec": spec})).unwrap()
    }

    #[test]
    fn init_containers_count_at_their_peak_and_sidecars_throughout() {
        let with_cpu = |cpu: &str| json!({"name": cpu, "resources": {"requests": {"cpu": cpu}}});
        let mut sidecar = with_cpu("200m");
        sidecar["restartPolicy"] = json!("Always");
        let containers = json!([with_cpu("100m"), with_cpu("150m")]);
        let plain = pod(json!({"containers": containers.clone()}));
        assert_eq!(needs(&plain).get(CPU), 250);
        let with_sidecar =
            pod(json!({"containers": containers.clone(), "initContainers": [sidecar.clone()]}));
        assert_eq!(needs(&with_sidecar).get(CPU), 450);
        let peak =
            pod(json!({"containers": containers, "initContainers": [sidecar, with_cpu("500m")]}));
        assert_eq!(needs(&peak).get(CPU), 700);
        assert_eq!(needs(&peak).get(PODS), 1);
    }

    #[test]
    fn limits_stand_in_for_requests_and_defaults_for_nothing() {
        let limited =
            pod(json!({"containers": [{"name": "a", "resources": {"limits": {"cpu": "2"}}}]}));
        assert_eq!(needs(&limited).get(CPU), 2000);
        let bare = pod(json!({"containers": [{"name": "a"}]}));
        assert_eq!(needs(&bare).get(CPU), 0);
        assert_eq!(likely_use(&bare), (DEFAULT_CPU_MILLI, DEFAULT_MEMORY_BYTES));
    }
}
