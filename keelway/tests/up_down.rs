//! `up` and `down` when things go wrong, with the real binary and containerd. The API server and the kubelet are stand-ins:
//! what they do is not looked at here, only that nothing of a cluster is left.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use keelway::cgroup::Hierarchies;
use keelway::state::{ClusterState, StateDir};

const KEELWAY: &str = env!("CARGO_BIN_EXE_keelway");
const PATIENCE: Duration = Duration::from_secs(20);

/// A cluster of one test: its own state folder, kubeconfig and stand-ins.
struct Scene {
    name: String,
    dir: tempfile::TempDir,
}

impl Scene {
    /// None, with the reason, where such a test cannot run.
    fn new(test: &str, control_plane: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().expect("a folder");
        for (program, script) in [
            ("keelway-controlplane", control_plane),
            ("keelway-kubelet", "exec sleep 1000"),
        ] {
            let path = dir.path().join(program);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        }
        fs::create_dir(dir.path().join("images")).expect("a folder");
        empty_image(&dir.path().join("images"));
        Some(Scene {
            name: format!("ud-{test}-{}", std::process::id()),
            dir,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(KEELWAY);
        command
            .args(arguments)
            .env("KEELWAY_STATE_DIR", self.path("state"))
            .env("KUBECONFIG", self.path("kubeconfig"));
        command
            .env("KEELWAY_BIN_DIR", self.dir.path())
            .env("KEELWAY_IMAGES_DIR", self.path("images"))
            .stdin(Stdio::null());
        command
    }

    fn up(&self, more: &[&str]) -> Command {
        let mut command = self.command(&["up", "--name", &self.name, "--nodes", "1", "--no-pull"]);
        command.args(more);
        command
    }

    fn down(&self) -> Output {
        self.command(&["down", "--name", &self.name])
            .output()
            .expect("down runs")
    }

    fn state(&self) -> Option<ClusterState> {
        StateDir::at(self.path("state")).cluster(&self.name).read()
    }

    /// Starts `up` and waits until its nodes run.
    fn half_up(&self) -> (Child, ClusterState) {
        #[expect(
            clippy::zombie_processes,
            reason = "the tests that call this wait for it"
        )]
        let up = self
            .up(&[])
            .stderr(Stdio::null())
            .spawn()
            .expect("up starts");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(state) = self.state().filter(|state| {
                state.nodes.len() == 2 && state.nodes.iter().all(|node| node.init.is_some())
            }) {
                return (up, state);
            }
            assert!(Instant::now() < deadline, "the nodes do not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Holds that nothing of the cluster is on the machine.
    fn nothing_is_left(&self) {
        let hierarchies = Hierarchies::of_this_machine().expect("cgroups");
        assert!(
            !hierarchies.clusters().contains(&self.name),
            "control groups are left"
        );
        assert!(!self.path("state").exists(), "the state folder is left");
        assert!(!self.path("kubeconfig").exists(), "the kubeconfig is left");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(
            !mounts.contains(&self.dir.path().display().to_string()),
            "a mount is left"
        );
        for process in fs::read_dir("/proc").expect("proc").flatten() {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            assert!(
                !String::from_utf8_lossy(&line).contains(&self.dir.path().display().to_string()),
                "a process is left: {process:?}"
            );
        }
    }
}

/// Writes an archive with an image of no layers.
fn empty_image(folder: &Path) {
    let config = r#"{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[]}}"#;
    let manifest = r#"[{"Config":"config.json","RepoTags":["localhost/empty:1"],"Layers":[]}]"#;
    fs::write(folder.join("config.json"), config).expect("written");
    fs::write(folder.join("manifest.json"), manifest).expect("written");
    let tar = Command::new("tar")
        .args(["-cf", "empty.tar", "manifest.json", "config.json"])
        .current_dir(folder)
        .status();
    assert!(tar.expect("tar runs").success());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_up_that_fails_takes_down_what_it_made_and_shows_why() {
    let Some(scene) = Scene::new("fails", "echo I cannot start today >&2; exit 3") else {
        return;
    };
    let output = scene.up(&[]).output().expect("up runs");
    assert!(!output.status.success());
    let stderr = stderr(&output);
    assert!(
        stderr.contains("controlplane has failed") && stderr.contains("exit status 3"),
        "{stderr}"
    );
    assert!(
        stderr.contains("I cannot start today"),
        "the service's own words are shown: {stderr}"
    );
    scene.nothing_is_left();
}

#[test]
fn an_archive_that_is_none_fails_the_up_and_is_named() {
    let Some(scene) = Scene::new("archive", "exec sleep 1000") else {
        return;
    };
    fs::write(scene.path("images/broken.tar"), "no archive").expect("written");
    let output = scene.up(&[]).output().expect("up runs");
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("broken.tar"),
        "{}",
        stderr(&output)
    );
    scene.nothing_is_left();
}

#[test]
fn an_up_that_takes_too_long_takes_down_what_it_made() {
    let Some(scene) = Scene::new("slow", "exec sleep 1000") else {
        return;
    };
    let output = scene.up(&["--timeout", "1"]).output().expect("up runs");
    assert!(
        stderr(&output).contains("did not come up within 1s"),
        "{}",
        stderr(&output)
    );
    scene.nothing_is_left();
}

#[test]
fn a_second_up_of_the_same_name_is_refused_and_the_first_goes_on() {
    let Some(scene) = Scene::new("second", "exec sleep 1000") else {
        return;
    };
    let (mut up, state) = scene.half_up();
    let output = scene.up(&[]).output().expect("up runs");
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("another keelway command works on cluster"),
        "{}",
        stderr(&output)
    );
    assert!(
        state.nodes.iter().all(|node| node.is_running()),
        "the first one's nodes run on"
    );
    up.kill().expect("killed");
    up.wait().expect("reaped");
    assert!(scene.down().status.success());
    scene.nothing_is_left();
}

#[test]
fn down_removes_what_a_killed_up_left_and_again_is_fine() {
    let Some(scene) = Scene::new("killed", "exec sleep 1000") else {
        return;
    };
    let (mut up, _) = scene.half_up();
    up.kill().expect("killed");
    up.wait().expect("reaped");
    let output = scene.down();
    assert!(output.status.success(), "{}", stderr(&output));
    scene.nothing_is_left();
    let again = scene.down();
    assert!(again.status.success());
    assert!(String::from_utf8_lossy(&again.stdout).contains("is not up"));
}

#[test]
fn down_finds_a_cluster_whose_state_is_gone_by_its_control_groups() {
    let Some(scene) = Scene::new("lost", "exec sleep 1000") else {
        return;
    };
    // Kept on error: the nodes go on without `up`.
    let output = scene
        .up(&["--timeout", "1", "--keep-on-error"])
        .output()
        .expect("up runs");
    assert!(!output.status.success());
    let state = scene.state().expect("it was kept");
    assert!(
        state.nodes.iter().all(|node| node.is_running()),
        "{}",
        stderr(&output)
    );
    fs::remove_dir_all(scene.path("state")).expect("removed");
    let refused = scene.up(&[]).output().expect("up runs");
    assert!(
        stderr(&refused).contains("this state folder does not know"),
        "{}",
        stderr(&refused)
    );
    assert!(scene.down().status.success());
    assert!(!state.nodes.iter().any(|node| node.is_running()));
    scene.nothing_is_left();
}

#[test]
fn an_up_without_root_says_so_and_makes_nothing() {
    let Some(scene) = Scene::new("user", "exec sleep 1000") else {
        return;
    };
    // A copy that another user can reach, wherever the build is.
    let program = scene.path("keelway");
    fs::copy(KEELWAY, &program).expect("copied");
    fs::set_permissions(scene.dir.path(), fs::Permissions::from_mode(0o755)).expect("readable");
    let output = Command::new(&program)
        .args(["up", "--name", &scene.name])
        .uid(65534)
        .gid(65534)
        .output()
        .expect("up runs");
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("needs root"),
        "{}",
        stderr(&output)
    );
    scene.nothing_is_left();
}

#[test]
fn wrong_settings_are_refused_before_anything_is_made() {
    let Some(scene) = Scene::new("wrong", "exec sleep 1000") else {
        return;
    };
    let config = scene.path("config.yaml");
    fs::write(&config, "nodez: 3\n").expect("written");
    let config = config.display().to_string();
    for (arguments, part) in [
        (vec!["--nodes", "0"], "1 to 100"),
        (vec!["--config", &config], "nodez"),
        (vec!["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (vec!["--image-dir", "/nonexistent"], "/nonexistent"),
        (vec!["--bin-dir", "/nonexistent"], "/nonexistent"),
    ] {
        let output = scene
            .command(&["up", "--name", &scene.name])
            .args(&arguments)
            .output()
            .expect("up runs");
        assert!(
            !output.status.success() && stderr(&output).contains(part),
            "{arguments:?}: {}",
            stderr(&output)
        );
    }
    let output = scene
        .command(&["up", "--name", "../x"])
        .output()
        .expect("up runs");
    assert!(
        stderr(&output).contains("lower-case"),
        "{}",
        stderr(&output)
    );
    scene.nothing_is_left();
}
