//! notes: what a worker makes of a look at the runtime: the last runs of its containers, how they ended, and what they left.

use std::path::Path;

use super::{SETTLE_LOOKS_MAX, Worker};
use crate::logs;
use crate::pod::memory::{OpKey, Verdicts};
use crate::pod::status::known_status;
use crate::pod::{all_containers, find_container};
use crate::runtime::{ContainerPhase, ContainerView, PodView};
use crate::volume::PodFolder;

/// A termination message is cut to this (upstream's figure).
const TERMINATION_MESSAGE_BYTES_MAX: usize = 4096;

impl Worker {
    /// What the last kubelet reported holds until probes say otherwise: a restart of the kubelet takes no pod out of service.
    pub(super) fn adopt(&mut self) {
        let Some(spec) = &self.pod.spec else { return };
        for (container, _) in all_containers(spec) {
            let Some(run) = self
                .view
                .latest(&container.name)
                .filter(|run| run.phase == ContainerPhase::Running)
            else {
                continue;
            };
            let Some(known) = known_status(&self.pod, container) else {
                continue;
            };
            if known
                .container_id
                .as_deref()
                .and_then(|id| id.rsplit_once("://"))
                .map(|(_, id)| id)
                != Some(run.id.as_str())
            {
                continue;
            }
            let started = known.started.filter(|started| *started);
            let verdicts = Verdicts {
                startup: started,
                readiness: started.map(|_| known.ready),
                ..Default::default()
            };
            self.memory.verdicts.insert(run.id.clone(), verdicts);
        }
    }

    /// Takes over a look at the runtime.
    pub(super) fn take_note(&mut self, view: PodView) {
        for run in view.containers.iter().rev() {
            let fresh_end = run.phase == ContainerPhase::Exited
                && !self.memory.termination_messages.contains_key(&run.id);
            if fresh_end {
                let message = self.termination_message(run);
                self.memory
                    .termination_messages
                    .insert(run.id.clone(), message);
            }
            let newer = self
                .memory
                .last_seen
                .get(&run.name)
                .is_none_or(|known| known.attempt <= run.attempt);
            if newer {
                self.memory.last_seen.insert(run.name.clone(), run.clone());
            }
        }
        for known in self.memory.last_seen.values_mut() {
            let gone = !view.containers.iter().any(|c| c.id == known.id);
            if gone && known.phase != ContainerPhase::Exited {
                // It vanished while it ran: how it ended will never be known.
                known.phase = ContainerPhase::Exited;
                known.exit_code = 137;
                known.reason = "ContainerStatusUnknown".to_owned();
                known.message =
                    "The container could not be located when the pod was looked at".to_owned();
                known.finished_at_ns =
                    i64::try_from(self.context.clock.now().as_nanosecond()).unwrap_or(0);
            }
        }
        let alive = |id: &str| {
            view.containers
                .iter()
                .any(|c| c.id == id && c.phase != ContainerPhase::Exited)
        };
        self.memory.verdicts.retain(|id, _| alive(id));
        self.memory.stop_deadlines.retain(|id, _| alive(id));
        self.memory.limits.retain(|id, _| alive(id));
        self.memory.post_start.retain(|id| {
            alive(id)
                || self
                    .memory
                    .in_flight
                    .iter()
                    .any(|key| matches!(key, OpKey::Start(_)))
        });
        self.view = view;
        for sandbox in &mut self.view.sandboxes {
            self.context.node.order(&mut sandbox.ips);
        }
        let view = &self.view;
        let starting = !self.memory.in_flight.is_empty();
        self.announced.retain(|id, looks| {
            *looks += 1;
            let known = view.containers.iter().find(|c| c.id == **id);
            let unsettled = known.map_or(starting, |c| c.phase == ContainerPhase::Running)
                || view.sandboxes.iter().any(|s| s.id == **id && s.ready);
            unsettled && *looks < SETTLE_LOOKS_MAX
        });
    }

    fn termination_message(&self, run: &ContainerView) -> String {
        let path = PodFolder::new(&self.context.config.root_dir, &self.key.uid)
            .termination_log(&run.name, run.attempt);
        let bytes = std::fs::read(path).unwrap_or_default();
        let bytes = &bytes[..bytes.len().min(TERMINATION_MESSAGE_BYTES_MAX)];
        if !bytes.is_empty() {
            return String::from_utf8_lossy(bytes).into_owned();
        }
        let container = find_container(&self.pod, &run.name);
        let policy = container.and_then(|c| c.termination_message_policy);
        let falls_back = policy.as_deref() == Some("FallbackToLogsOnError");
        if falls_back && run.exit_code != 0 {
            return logs::last_words(Path::new(&run.log_path), TERMINATION_MESSAGE_BYTES_MAX / 2);
        }
        run.message.clone()
    }
}
