//! Ports of the node that pods ask for, while it is not known what else asks for them.

use super::settle::is_sound;
use super::{Worker, reason};

impl Worker {
    /// Brings the maps to the pods' ports of the node while Services are not known, an API server being away: what an earlier agent
    /// left stays as it is. A port that this gave to a Service waits until it is known whose it is.
    pub(super) fn settle_host_ports(&mut self) {
        let Some(node) = self.node.as_mut() else {
            return;
        };
        let mut waiting = Vec::new();
        for (key, wish) in self.pods.take_host_ports() {
            if !is_sound(&key, &wish) {
                continue;
            }
            match node.ledger.is_free_for(&wish) {
                true => node.ledger.set(&key, wish),
                false => waiting.push(key),
            }
        }
        for key in &waiting {
            self.pods.put_back_host_ports(key);
        }
        let batch = node.ledger.diff();
        if batch.ops.is_empty() {
            return;
        }
        match node.bring(&batch).outcome {
            Ok(()) => drop(self.problems.remove("host ports")),
            Err(error) => self.problem("host ports", reason(&error)),
        }
    }
}
