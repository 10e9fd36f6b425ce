//! How quotas, limits, budgets, autoscalers and what runs on a schedule print.

use serde_json::Value;

use super::{
    Printer, age, column, containers, count, created, name, or_none, pairs, selector, wide,
};
use crate::api::fields::Fields;

/// A count or a share as it is written, or what stands for its absence.
fn amount(object: &Value, pointer: &str, absent: &str) -> Value {
    match object.pointer(pointer) {
        Some(Value::String(text)) => text.as_str().into(),
        Some(Value::Number(number)) => number.to_string().into(),
        _ => absent.into(),
    }
}

pub(super) static CRON_JOB: Printer = Printer {
    columns: &[
        column("Name"),
        column("Schedule"),
        column("Timezone"),
        super::boolean("Suspend"),
        count("Active"),
        column("Last Schedule"),
        column("Age"),
        wide("Containers"),
        wide("Images"),
        wide("Selector"),
    ],
    cells: |cron| {
        let (names, images) = containers(
            cron.pointer("/spec/jobTemplate/spec/template")
                .unwrap_or(&Value::Null),
        );
        let last = match cron.text("/status/lastScheduleTime") {
            "" => "<none>".to_owned(),
            at => age(at),
        };
        vec![
            name(cron),
            cron.text("/spec/schedule").into(),
            or_none(cron.text("/spec/timeZone")).into(),
            if cron.flag("/spec/suspend") {
                "True"
            } else {
                "False"
            }
            .into(),
            cron.items("/status/active").len().into(),
            last.into(),
            created(cron),
            names,
            images,
            selector(cron.pointer("/spec/jobTemplate/spec/selector")).into(),
        ]
    },
};

pub(super) static POD_TEMPLATE: Printer = Printer {
    columns: &[
        column("Name"),
        column("Containers"),
        column("Images"),
        column("Pod Labels"),
    ],
    cells: |object| {
        let (names, images) = containers(object.pointer("/template").unwrap_or(&Value::Null));
        let labels = pairs(object.object("/template/metadata/labels"));
        vec![name(object), names, images, labels.into()]
    },
};

pub(super) static QUOTA: Printer = Printer {
    columns: &[
        column("Name"),
        column("Request"),
        column("Limit"),
        column("Age"),
    ],
    cells: |quota| {
        let mut hard: Vec<&String> = quota
            .object("/spec/hard")
            .into_iter()
            .flatten()
            .map(|(resource, _)| resource)
            .collect();
        hard.sort();
        let show = |limits: bool| {
            let shown = hard
                .iter()
                .filter(|name| name.starts_with("limits.") == limits);
            let shown = shown.map(|resource| {
                let of = |map: &str| {
                    let value = quota.object(map).and_then(|map| map.get(*resource));
                    value.and_then(Value::as_str).unwrap_or("0").to_owned()
                };
                format!("{resource}: {}/{}", of("/status/used"), of("/spec/hard"))
            });
            shown.collect::<Vec<_>>().join(", ")
        };
        vec![
            name(quota),
            show(false).into(),
            show(true).into(),
            created(quota),
        ]
    },
};

pub(super) static DISRUPTION_BUDGET: Printer = Printer {
    columns: &[
        column("Name"),
        column("Min Available"),
        column("Max Unavailable"),
        count("Allowed Disruptions"),
        column("Age"),
    ],
    cells: |budget| {
        vec![
            name(budget),
            amount(budget, "/spec/minAvailable", "N/A"),
            amount(budget, "/spec/maxUnavailable", "N/A"),
            budget.int("/status/disruptionsAllowed").into(),
            created(budget),
        ]
    },
};

pub(super) static AUTOSCALER: Printer = Printer {
    columns: &[
        column("Name"),
        column("Reference"),
        column("Targets"),
        column("MinPods"),
        column("MaxPods"),
        column("Replicas"),
        column("Age"),
    ],
    cells: |autoscaler| {
        let reference = format!(
            "{}/{}",
            autoscaler.text("/spec/scaleTargetRef/kind"),
            autoscaler.text("/spec/scaleTargetRef/name")
        );
        let least = match autoscaler.pointer("/spec/minReplicas") {
            Some(least) => least.to_string(),
            None => "<unset>".to_owned(),
        };
        vec![
            name(autoscaler),
            reference.into(),
            targets(autoscaler).into(),
            least.into(),
            autoscaler.int("/spec/maxReplicas").into(),
            autoscaler.int("/status/currentReplicas").into(),
            created(autoscaler),
        ]
    },
};

/// What an autoscaler aims at, each with where it is: `cpu: 40%/80%`.
fn targets(autoscaler: &Value) -> String {
    const SHOWN: usize = 2;
    let share = autoscaler.pointer("/spec/targetCPUUtilizationPercentage");
    if let Some(share) = share {
        let now = autoscaler.pointer("/status/currentCPUUtilizationPercentage");
        let now = now.map_or("<unknown>".to_owned(), |now| format!("{now}%"));
        return format!("cpu: {now}/{share}%");
    }
    let metrics = autoscaler.items("/spec/metrics");
    let shown: Vec<String> = metrics
        .iter()
        .enumerate()
        .take(SHOWN)
        .map(|(at, metric)| {
            let kind = metric.text("/type");
            let mut field = kind.to_owned();
            field.get_mut(..1).map(str::make_ascii_lowercase);
            let target = metric.pointer(&format!("/{field}/target"));
            let current =
                autoscaler.pointer(&format!("/status/currentMetrics/{at}/{field}/current"));
            let value = |of: Option<&Value>| {
                let of = of?;
                if let Some(share) = of.pointer("/averageUtilization") {
                    return Some(format!("{share}%"));
                }
                let text = [of.text("/averageValue"), of.text("/value")];
                let text = text.into_iter().find(|text| !text.is_empty())?;
                Some(text.to_owned())
            };
            let now = value(current).unwrap_or("<unknown>".to_owned());
            let wanted = value(target).unwrap_or("<auto>".to_owned());
            match metric.text(&format!("/{field}/name")) {
                "" => format!("{now}/{wanted}"),
                resource => format!("{resource}: {now}/{wanted}"),
            }
        })
        .collect();
    let more = metrics.len().saturating_sub(SHOWN);
    match (shown.is_empty(), more) {
        (true, _) => "<none>".to_owned(),
        (false, 0) => shown.join(", "),
        (false, more) => format!("{} + {more} more...", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn quotas_show_what_is_used_of_what_is_allowed() {
        let quota = json!({"metadata": {"name": "q", "creationTimestamp": ""}, "spec": {"hard": {"pods": "3", "limits.cpu": "2", "cpu": "1"}},
            "status": {"used": {"pods": "1", "limits.cpu": "500m"}}});
        let cells = (QUOTA.cells)(&quota);
        assert_eq!(cells[1], "cpu: 0/1, pods: 1/3");
        assert_eq!(cells[2], "limits.cpu: 500m/2");
    }

    #[test]
    fn autoscalers_show_where_they_are() {
        let autoscaler = json!({"spec": {"metrics": [
            {"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilization": 80}}},
            {"type": "Pods", "pods": {"target": {"averageValue": "5"}}},
            {"type": "External", "external": {"target": {"value": "1"}}}]},
            "status": {"currentMetrics": [{"type": "Resource", "resource": {"current": {"averageUtilization": 40}}}]}});
        assert_eq!(
            targets(&autoscaler),
            "cpu: 40%/80%, <unknown>/5 + 1 more..."
        );
    }
}
