//! helm: a chart with hooks is installed, upgraded, rolled back and uninstalled.

use std::time::Duration;

use keelway_tests::cluster::{Cluster, client, project};
use keelway_tests::process::eventually;
use serde_json::Value;

fn helm(cluster: &Cluster, arguments: &[&str]) -> keelway_tests::process::Finished {
    let folder = std::env::temp_dir()
        .join(format!("{}-helm", cluster.name))
        .display()
        .to_string();
    let program = client("helm");
    let environment = [
        ("HELM_CACHE_HOME", folder.as_str()),
        ("HELM_CONFIG_HOME", &folder),
        ("HELM_DATA_HOME", &folder),
    ];
    let command = [&[program.as_str()], arguments].concat();
    let finished = cluster.run(&command, &environment);
    let _ = std::fs::remove_dir_all(&folder);
    finished
}

pub fn a_chart_with_hooks_lives_through_its_releases(cluster: &Cluster) {
    if client("helm") == "helm" {
        println!("skipped: helm is absent");
        return;
    }
    let chart = project().join("tests/e2e/chart").display().to_string();
    let version = format!("--set=version={}", env!("CARGO_PKG_VERSION"));
    let wait = ["--wait", "--timeout=90s", version.as_str()];
    let ran = |hook: &str| {
        let map = cluster
            .kubectl(&["get", "configmap", "greeter", "-o", "json"])
            .ok();
        let map: Value = serde_json::from_str(&map).expect("JSON");
        let logs = cluster.kubectl(&["logs", &format!("greeter-{hook}")]).ok();
        (
            map["data"]["greeting"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            logs,
        )
    };
    helm(
        cluster,
        &[
            &["install", "greeter", &chart, "--set=greeting=hello"],
            &wait[..],
        ]
        .concat(),
    )
    .ok();
    let (greeting, log) = ran("pre-install");
    assert_eq!(
        (greeting.as_str(), log.as_str()),
        ("hello", "pre-install of revision 1\n")
    );
    assert_eq!(
        cluster.get(&["deployment", "greeter"])["status"]["readyReplicas"],
        1
    );

    helm(
        cluster,
        &[
            &["upgrade", "greeter", &chart, "--set=greeting=goodbye"],
            &wait[..],
        ]
        .concat(),
    )
    .ok();
    let (greeting, log) = ran("post-upgrade");
    assert_eq!(
        (greeting.as_str(), log.as_str()),
        ("goodbye", "post-upgrade of revision 2\n")
    );

    helm(
        cluster,
        &["rollback", "greeter", "1", "--wait", "--timeout=90s"],
    )
    .ok();
    assert_eq!(ran("pre-install").0, "hello");
    let history = helm(cluster, &["history", "greeter", "--output=json"]).ok();
    let history: Value = serde_json::from_str(&history).expect("JSON");
    let last = history
        .as_array()
        .and_then(|all| all.last())
        .expect("releases")
        .clone();
    assert_eq!(
        (last["revision"].as_i64(), last["status"].as_str()),
        (Some(3), Some("deployed")),
        "{history}"
    );
    let listed = helm(cluster, &["list", "--short"]).ok();
    assert_eq!(listed, "greeter\n");

    helm(
        cluster,
        &["uninstall", "greeter", "--wait", "--timeout=60s"],
    )
    .ok();
    // Pods end in the background after their Deployment has gone.
    let selector = "--selector=app.kubernetes.io/instance=greeter";
    eventually("nothing of the release", Duration::from_secs(30), || {
        let left = cluster.kubectl(&["get", "all,configmaps", selector, "-o", "name"]);
        match left.ok() {
            left if left.is_empty() => Ok(()),
            left => Err(left),
        }
    });
    cluster
        .kubectl(&[
            "delete",
            "pod",
            "greeter-pre-install",
            "greeter-post-upgrade",
        ])
        .ok();
}
