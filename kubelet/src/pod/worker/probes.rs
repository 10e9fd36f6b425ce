//! probes: which run, and what their verdicts change.

use super::{Signal, Worker};
use crate::cluster::EventKind;
use crate::pod::memory::at_ns;
use crate::pod::plan::{current_sandbox, is_started};
use crate::pod::{all_containers, host_network, is_sidecar};
use crate::probe::{self, Finding, ProbeKind, Subject};
use crate::runtime::ContainerPhase;

impl Worker {
    pub(super) fn probed(&mut self, finding: Finding) {
        let Finding {
            container_id,
            kind,
            verdict,
            failure,
        } = finding;
        let name = self
            .view
            .containers
            .iter()
            .find(|c| c.id == container_id)
            .map(|c| c.name.clone());
        if let (Some(name), Some(failure)) = (&name, failure) {
            let message = format!("{} probe failed: {failure}", kind.name());
            self.context.cluster.event(
                &self.pod,
                Some(name),
                EventKind::Warning,
                "Unhealthy",
                message,
            );
        }
        let Some(verdict) = verdict else { return };
        let verdicts = self.memory.verdicts.entry(container_id).or_default();
        match kind {
            ProbeKind::Readiness => verdicts.readiness = Some(verdict),
            ProbeKind::Startup => {
                verdicts.startup = Some(verdict);
                verdicts.startup_failed = !verdict;
            }
            ProbeKind::Liveness => verdicts.liveness_failed = !verdict,
        }
    }

    /// Probes run for every running container: startup first, the others once it is started.
    pub(super) fn keep_probes(&mut self) {
        let mut wanted: Vec<(Subject, ProbeKind, Option<bool>)> = Vec::new();
        let ending = self.memory.ending_since.is_some();
        if let (Some(spec), Some(sandbox)) = (&self.pod.spec, current_sandbox(&self.view)) {
            let ips = if host_network(&self.pod) {
                &self.context.node.ips
            } else {
                &sandbox.ips
            };
            for (container, init) in all_containers(spec) {
                let run = self.view.in_sandbox(&container.name, &sandbox.id);
                let Some(run) = run.filter(|run| run.phase == ContainerPhase::Running) else {
                    continue;
                };
                if init && !is_sidecar(container) {
                    continue;
                }
                let verdicts = self
                    .memory
                    .verdicts
                    .get(&run.id)
                    .copied()
                    .unwrap_or_default();
                let age = self
                    .context
                    .clock
                    .now()
                    .duration_since(at_ns(run.started_at_ns))
                    .unsigned_abs();
                let pod_ip = ips.first().cloned().unwrap_or_default();
                let subject = Subject {
                    container_id: run.id.clone(),
                    container: container.clone(),
                    pod_ip,
                    age,
                };
                if is_started(container, run, &self.memory) {
                    wanted.push((subject.clone(), ProbeKind::Readiness, verdicts.readiness));
                    // A pod that is ending is not restarted, so whether it lives no longer matters.
                    if !ending && !verdicts.liveness_failed {
                        wanted.push((subject, ProbeKind::Liveness, Some(true)));
                    }
                } else if !ending && !verdicts.startup_failed {
                    wanted.push((subject, ProbeKind::Startup, None));
                }
            }
        }
        self.probes.retain(|(id, kind), _| {
            wanted
                .iter()
                .any(|(subject, k, _)| subject.container_id == *id && k == kind)
        });
        for (subject, kind, known) in wanted {
            let key = (subject.container_id.clone(), kind);
            if self.probes.contains_key(&key) || kind.of(&subject.container).is_none() {
                continue;
            }
            let signals = self.signals.clone();
            let report = move |finding| {
                let _ = signals.send(Signal::Probed(finding));
            };
            self.probes.extend(
                probe::spawn(self.context.runtime.clone(), subject, kind, known, report)
                    .map(|task| (key, task)),
            );
        }
    }
}
