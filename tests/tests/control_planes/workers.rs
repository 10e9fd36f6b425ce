//! Workers that get another build's programs under their pods: no container ends, and no request is lost.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use keelway_tests::cluster::{Cluster, images};
use keelway_tests::machine::processes;
use keelway_tests::process::{eventually, run};
use keelway_tests::request_loop::RequestLoop;
use serde_json::{Value, json};

use crate::upgrade::{UPGRADE_SECONDS_MAX, another_build, upgrading_with, written};
use crate::works;

const AGENTS: &str = "app.kubernetes.io/name=keelway-agent";
const DNS: &str = "k8s-app=kube-dns";

/// This build's images, of which the agent's has another digest.
fn another_builds_images(to: &Path) {
    fs::create_dir(to).expect("a folder");
    let read = |path: &Path| -> Value {
        let text = fs::read(path).expect("it is in the archive");
        serde_json::from_slice(&text).expect("JSON")
    };
    for archive in fs::read_dir(images()).expect("there are images").flatten() {
        let (path, name) = (archive.path(), archive.file_name());
        if path.extension().is_none_or(|end| end != "tar") {
            continue;
        }
        if name != "agent.tar" {
            std::os::unix::fs::symlink(&path, to.join(&name)).expect("linked");
            continue;
        }
        let unpacked = to.join("unpacked");
        fs::create_dir(&unpacked).expect("a folder");
        let (folder, path) = (unpacked.display().to_string(), path.display().to_string());
        run(&["tar", "-xf", &path, "-C", &folder], &[], 60).ok();
        let mut index = read(&unpacked.join("index.json"));
        let blobs = unpacked.join("blobs/sha256");
        let digest = index["manifests"][0]["digest"].as_str().expect("a digest");
        let mut manifest = read(&blobs.join(digest.trim_start_matches("sha256:")));
        manifest["annotations"] = json!({"build": "another"});
        let text = manifest.to_string();
        let file = blobs.join("new");
        fs::write(&file, &text).expect("written");
        let sum = run(&["sha256sum", &file.display().to_string()], &[], 60).ok();
        let sum = sum.split_whitespace().next().expect("a sum");
        fs::rename(&file, blobs.join(sum)).expect("renamed");
        index["manifests"][0]["digest"] = format!("sha256:{sum}").into();
        index["manifests"][0]["size"] = text.len().into();
        fs::write(unpacked.join("index.json"), index.to_string()).expect("written");
        let packed = to.join(&name).display().to_string();
        let files = ["oci-layout", "index.json", "blobs"];
        let command = ["tar", "-cf", packed.as_str(), "-C", folder.as_str()];
        run(&[&command[..], &files].concat(), &[], 60).ok();
        fs::remove_dir_all(&unpacked).expect("removed");
    }
}

fn pods(cluster: &Cluster, arguments: &[&str]) -> Vec<Value> {
    let found = cluster.get(&[&["pods"], arguments].concat());
    found["items"].as_array().expect("a list").clone()
}

/// The pods of a DaemonSet: which node each is on, and what tells it from the one after it.
fn of_nodes(cluster: &Cluster, selector: &str) -> BTreeMap<String, String> {
    let found = pods(cluster, &["-n", "kube-system", "--selector", selector]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let pair = |pod: &Value| {
        (
            text(&pod["spec"]["nodeName"]),
            text(&pod["metadata"]["uid"]),
        )
    };
    found.iter().map(pair).collect()
}

/// The containers of the users' pods, with how often each was started again.
fn containers(cluster: &Cluster) -> BTreeMap<String, i64> {
    let all = pods(cluster, &[]);
    let all = all
        .iter()
        .filter_map(|pod| pod["status"]["containerStatuses"].as_array());
    let pair = |container: &Value| {
        let id = container["containerID"].as_str().unwrap_or_default();
        (
            id.to_owned(),
            container["restartCount"].as_i64().unwrap_or(-1),
        )
    };
    all.flatten().map(pair).collect()
}

/// The file that a worker's kubelet runs; none while there is none.
fn kubelet_of(cluster: &Cluster, node: &str) -> Option<u64> {
    let group = format!("{}/{node}", cluster.name);
    let process = processes(&group, "keelway-kubelet").into_iter().next()?;
    let program = fs::metadata(format!("/proc/{}/exe", process.pid)).ok()?;
    Some(program.ino())
}

#[test]
fn workers_get_another_builds_programs_under_their_pods() {
    let name = format!("workers-{}", std::process::id());
    let Some(cluster) = Cluster::own(&name, &["--nodes", "2"]) else {
        return;
    };
    cluster.run_example();
    let build = another_build();
    let images = build.path().join("images");
    another_builds_images(&images);
    let images = images.display().to_string();
    let upgrading = || {
        let flags = ["--only", "workers", "--image-dir", &images];
        upgrading_with(&cluster, build.path(), &flags)
    };
    let program = fs::metadata(build.path().join("keelway-kubelet")).expect("a file");
    let is_new = |node: &str| kubelet_of(&cluster, node) == Some(program.ino());
    let before = containers(&cluster);
    assert!(before.len() > 3, "{before:?}");
    let (agents, dns) = (of_nodes(&cluster, AGENTS), of_nodes(&cluster, DNS));
    let requests = RequestLoop::start(&cluster);

    // One that is killed with the first worker's kubelet just replaced leaves it running, and the next one goes on from there.
    let cut_off = upgrading();
    eventually(
        "a kubelet of the new build runs",
        UPGRADE_SECONDS_MAX,
        || {
            let runs = is_new("node-1");
            runs.then_some(())
                .ok_or_else(|| format!("{:?}", written(&cluster)))
        },
    );
    drop(cut_off);
    let said = upgrading().finish(UPGRADE_SECONDS_MAX).concat();
    assert!(
        said.contains("of 2 workers") && !said.contains("0 of 2"),
        "{said}"
    );

    assert!(is_new("node-1") && is_new("node-2"));
    assert!(
        written(&cluster)
            .iter()
            .all(|node| node["unsettled"] != true)
    );
    assert_eq!(containers(&cluster), before, "a container ended");
    let now = of_nodes(&cluster, AGENTS);
    assert!(
        now.len() == 2 && now.iter().all(|(node, uid)| agents[node] != *uid),
        "{agents:?} became {now:?}"
    );
    assert_eq!(of_nodes(&cluster, DNS), dns, "its image is the same");
    requests.finish();

    // What is of this build stays.
    let said = upgrading().finish(UPGRADE_SECONDS_MAX).concat();
    assert!(said.contains("0 of 2 workers"), "{said}");
    assert_eq!(of_nodes(&cluster, AGENTS), now);
    works(&cluster, 5);
}
