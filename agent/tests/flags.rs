//! What the agent is told by flags, and refuses.

use std::fs;

use clap::Parser as _;
use keelway_agent::config::RunFlags;

#[derive(Debug, clap::Parser)]
struct Line {
    #[command(flatten)]
    flags: RunFlags,
}

/// What is said against a kubeconfig with this server; nothing when it is taken.
fn refusal(server: &str) -> Option<String> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("kubeconfig");
    let kubeconfig = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": server}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "users": [{"name": "it", "user": {"token": "t"}}],
    });
    fs::write(&path, kubeconfig.to_string()).expect("a file");
    let path = path.to_str().expect("a path");
    let words = ["keelway-agent", "--node-name", "n", "--socket-lb", "off"];
    let words = words.into_iter().chain(["--service-cidr", "10.96.0.0/16"]);
    let line = Line::try_parse_from(words.chain(["--kubeconfig", path])).expect("flags");
    line.flags.validate().err().map(|error| error.to_string())
}

#[test]
fn a_kubeconfig_that_leads_to_a_service_is_refused() {
    let refused = refusal("https://10.96.0.1:443").expect("refused");
    assert!(
        refused.starts_with("--kubeconfig 10.96.0.1 is a Service's address"),
        "{refused}"
    );
    for taken in ["https://192.0.2.1:6443", "https://api.example:6443"] {
        assert_eq!(refusal(taken), None, "{taken}");
    }
}
