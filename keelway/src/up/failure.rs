//! Why a cluster did not come up.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::api::ClusterApi;
use crate::state::{ClusterDir, NodeState};

/// Lines of a failed service's log that are shown.
const LOG_LINES: usize = 15;

/// Says what can be seen of why a cluster did not come up, while it is still there: what is not ready, and the end of the
/// logs of services that failed.
pub(super) async fn explain(dir: &ClusterDir) {
    let Some(state) = dir.read() else { return };
    if state.nodes.iter().any(NodeState::is_running)
        && let Some(admin) = crate::status::kubeconfig_of(dir)
        && let Ok(api) = ClusterApi::new(&admin).await
        && let Ok(missing) =
            tokio::time::timeout(Duration::from_secs(3), api.what_is_missing()).await
    {
        eprint!("{missing}");
    }
    for node in &state.nodes {
        let folder = dir.node(&node.name);
        show_end("PID 1", &node.name, &folder.join("init.log"));
        let services = dir.services(&node.name);
        for service in services.iter().filter(|service| service.restarts > 0) {
            show_end(
                &service.name,
                &node.name,
                &folder
                    .join("var/log/keelway")
                    .join(format!("{}.log", service.name)),
            );
        }
    }
}

fn show_end(what: &str, node: &str, log: &Path) {
    let text = fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    if !lines.is_empty() {
        eprintln!("--- {what} on {node}, last lines:");
        for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
            eprintln!("    {line}");
        }
    }
}
