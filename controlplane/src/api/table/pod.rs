//! How pods print: one word for what the pod is doing, worked out from its containers.

use jiff::Timestamp;
use serde_json::Value;

use super::{Column, Printer, age, column, created, name, or_none, wide};
use crate::api::fields::Fields;

pub(super) static POD: Printer = Printer {
    columns: &[
        column("Name"),
        column("Ready"),
        column("Status"),
        Column {
            name: "Restarts",
            kind: "string",
            priority: 0,
        },
        column("Age"),
        wide("IP"),
        wide("Node"),
        wide("Nominated Node"),
        wide("Readiness Gates"),
    ],
    cells,
};

fn cells(pod: &Value) -> Vec<Value> {
    let summary = Summary::of(pod);
    let restarts = match summary.last_restart {
        Some(at) if summary.restarts > 0 => {
            format!("{} ({} ago)", summary.restarts, age(&at.to_string()))
        }
        _ => summary.restarts.to_string(),
    };
    let ip = pod
        .items("/status/podIPs")
        .first()
        .map_or(pod.text("/status/podIP"), |ip| ip.text("/ip"));
    vec![
        name(pod),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.reason.into(),
        restarts.into(),
        created(pod),
        or_none(ip).into(),
        or_none(pod.text("/spec/nodeName")).into(),
        or_none(pod.text("/status/nominatedNodeName")).into(),
        readiness_gates(pod).into(),
    ]
}

fn readiness_gates(pod: &Value) -> String {
    let gates = pod.items("/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let passed = gates
        .iter()
        .filter(|gate| condition(pod, gate.text("/conditionType")) == Some("True"))
        .count();
    format!("{passed}/{}", gates.len())
}

fn condition<'a>(pod: &'a Value, kind: &str) -> Option<&'a str> {
    pod.items("/status/conditions")
        .iter()
        .find(|c| c.text("/type") == kind)
        .map(|c| c.text("/status"))
}

/// What the columns Ready, Status and Restarts say.
struct Summary {
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<Timestamp>,
    reason: String,
}

impl Summary {
    fn of(pod: &Value) -> Self {
        let sidecar = |name: &str| {
            pod.items("/spec/initContainers")
                .iter()
                .any(|c| c.text("/name") == name && c.text("/restartPolicy") == "Always")
        };
        let sidecars = pod
            .items("/spec/initContainers")
            .iter()
            .filter(|c| c.text("/restartPolicy") == "Always")
            .count();
        let phase = pod.text("/status/phase");
        let mut summary = Self {
            ready: 0,
            total: pod.items("/spec/containers").len() + sidecars,
            restarts: 0,
            last_restart: None,
            reason: phase.to_owned(),
        };
        if pod.has("/status/reason") && !pod.text("/status/reason").is_empty() {
            summary.reason = pod.text("/status/reason").to_owned();
        }
        let gated =
            |c: &Value| c.text("/type") == "PodScheduled" && c.text("/reason") == "SchedulingGated";
        if pod.items("/status/conditions").iter().any(gated) {
            summary.reason = "SchedulingGated".to_owned();
        }

        let mut sidecar_restarts = (0, None);
        let mut initializing = false;
        for (at, status) in pod
            .items("/status/initContainerStatuses")
            .iter()
            .enumerate()
        {
            summary.count_restarts(status);
            let is_sidecar = sidecar(status.text("/name"));
            if is_sidecar {
                sidecar_restarts.0 += status.int("/restartCount");
                sidecar_restarts.1 = sidecar_restarts.1.max(finished(status));
            }
            let terminated = status.pointer("/state/terminated");
            if terminated.is_some_and(|t| t.int("/exitCode") == 0) {
                continue;
            }
            if is_sidecar && status.flag("/started") {
                summary.ready += usize::from(status.flag("/ready"));
                continue;
            }
            let waiting = status.text("/state/waiting/reason");
            summary.reason = match terminated {
                Some(terminated) => format!("Init:{}", ended(terminated)),
                None if !waiting.is_empty() && waiting != "PodInitializing" => {
                    format!("Init:{waiting}")
                }
                None => format!("Init:{at}/{}", pod.items("/spec/initContainers").len()),
            };
            initializing = true;
            break;
        }

        if !initializing || condition(pod, "Initialized") == Some("True") {
            (summary.restarts, summary.last_restart) = sidecar_restarts;
            let mut running = false;
            for status in pod.items("/status/containerStatuses").iter().rev() {
                summary.count_restarts(status);
                let waiting = status.text("/state/waiting/reason");
                if !waiting.is_empty() {
                    summary.reason = waiting.to_owned();
                } else if let Some(terminated) = status.pointer("/state/terminated") {
                    summary.reason = ended(terminated);
                } else if status.flag("/ready") && status.has("/state/running") {
                    running = true;
                    summary.ready += 1;
                }
            }
            if summary.reason == "Completed" && running {
                let ready = condition(pod, "Ready") == Some("True");
                summary.reason = if ready { "Running" } else { "NotReady" }.to_owned();
            }
        }

        if pod.has("/metadata/deletionTimestamp") {
            if pod.text("/status/reason") == "NodeLost" {
                summary.reason = "Unknown".to_owned();
            } else if !matches!(phase, "Succeeded" | "Failed") {
                summary.reason = "Terminating".to_owned();
            }
        }
        summary
    }

    fn count_restarts(&mut self, status: &Value) {
        self.restarts += status.int("/restartCount");
        self.last_restart = self.last_restart.max(finished(status));
    }
}

/// When the container's last run ended.
fn finished(status: &Value) -> Option<Timestamp> {
    status.text("/lastState/terminated/finishedAt").parse().ok()
}

/// How a terminated container ended, in one word.
fn ended(terminated: &Value) -> String {
    match (terminated.text("/reason"), terminated.int("/signal")) {
        ("", 0) => format!("ExitCode:{}", terminated.int("/exitCode")),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn columns(pod: Value) -> (String, String, String) {
        let cells = cells(&pod);
        let text = |at: usize| cells[at].as_str().unwrap_or_default().to_owned();
        (text(1), text(2), text(3))
    }

    #[test]
    fn a_pods_status_is_the_most_telling_word() {
        let two = json!([{"name": "a"}, {"name": "b"}]);
        let pending = json!({"spec": {"containers": two}, "status": {"phase": "Pending"}});
        assert_eq!(
            columns(pending),
            ("0/2".into(), "Pending".into(), "0".into())
        );

        let crash = json!({"spec": {"containers": [{"name": "a"}]}, "status": {"phase": "Running", "containerStatuses": [
            {"name": "a", "ready": false, "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}});
        assert_eq!(
            columns(crash),
            ("0/1".into(), "CrashLoopBackOff".into(), "3".into())
        );

        let init = json!({"spec": {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}, {"name": "j"}]},
            "status": {"phase": "Pending", "initContainerStatuses": [
                {"name": "i", "state": {"terminated": {"exitCode": 0}}}, {"name": "j", "state": {"running": {}}}]}});
        assert_eq!(columns(init), ("0/1".into(), "Init:1/2".into(), "0".into()));

        let leaving = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [{"name": "a"}]}, "status": {"phase": "Running", "containerStatuses": [
            {"name": "a", "ready": true, "restartCount": 0, "state": {"running": {}}}]}});
        assert_eq!(
            columns(leaving),
            ("1/1".into(), "Terminating".into(), "0".into())
        );
    }
}
