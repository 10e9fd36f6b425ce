//! The Service by which pods reach the API server.

use cluster_model::ServiceKey;

use super::ServicePlan;
use crate::dataplane::State;

/// Whether this is the Service of the API server itself.
pub fn is_lifeline(key: &ServiceKey) -> bool {
    &*key.namespace == "default" && &*key.name == "kubernetes"
}

/// Gives a plan without backends those that the maps hold under its frontends. When the API server's Service has no endpoint, whoever
/// is to give it one may need the Service: its last ones are the best guess, and no worse than a refusal. Says whether any were kept.
pub fn keep_backends(plan: &mut ServicePlan, held: &State) -> bool {
    let mut kept = false;
    for (frontend, route) in &plan.frontends {
        let Some(port) = plan.ports.get_mut(&route.internal) else {
            continue;
        };
        if !port.backends.active.is_empty() || !port.backends.terminating.is_empty() {
            continue;
        }
        let lead = held.frontends.get(frontend);
        let last = lead.and_then(|lead| held.services.get(&lead.internal));
        if let Some(last) =
            last.filter(|last| !last.active.is_empty() || !last.terminating.is_empty())
        {
            port.backends.active.clone_from(&last.active);
            port.backends.terminating.clone_from(&last.terminating);
            port.backends.maglev = last.maglev;
            port.backends.direct = last.direct;
            port.backends.silent = false;
            kept = true;
        }
    }
    kept
}
