//! Ports of the node that pods ask for, while it is not known what else asks for them.

use super::{Worker, reason};
use crate::plan::check;

impl Worker {
    /// Brings the maps to the pods' ports of the node while Services are not known, an API server being away: what an earlier agent
    /// left stays as it is. A port that this gave to a Service waits until it is known whose it is.
    pub(super) fn settle_host_ports(&mut self) {
        let Some(node) = self.node.as_mut() else {
            return;
        };
        let mut waiting = Vec::new();
        for (key, wish) in self.pods.take_host_ports() {
            match check(&wish) {
                Ok(()) if node.ledger.is_free_for(&wish) => node.ledger.set(&key, wish),
                Ok(()) => waiting.push(key),
                Err(violation) => {
                    tracing::error!(%key, %violation, "a plan is unsound and is not applied")
                }
            }
        }
        for key in &waiting {
            self.pods.put_back_host_ports(key);
        }
        let batch = node.ledger.diff();
        if batch.ops.is_empty() {
            return;
        }
        match node.apply(&batch.ops) {
            Ok(()) => {
                node.ledger.applied(&batch);
                self.problems.remove("host ports");
            }
            Err(error) => {
                match node.dataplane.state() {
                    Ok(held) => {
                        node.ledger.hold(held);
                        if error.is_limit() {
                            node.ledger.park();
                        }
                    }
                    Err(error) => {
                        tracing::error!(error = reason(&error), "the maps cannot be read back")
                    }
                }
                self.problem("host ports", reason(&error));
            }
        }
    }
}
