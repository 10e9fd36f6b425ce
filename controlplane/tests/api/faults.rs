//! Disks that fill up, or cannot be written to, below a running server.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::server::{Server, text};

const PATIENCE: Duration = Duration::from_secs(30);
const DISK: &str = "size=24m";

/// A small disk in a mount namespace of its own, which ends with the test, however that ends: who holds it reads from it.
struct Disk {
    holder: Child,
    folder: tempfile::TempDir,
}

impl Disk {
    /// None where that is not allowed.
    fn make() -> Option<Self> {
        if !nix::unistd::Uid::effective().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let script = r#"mount -t tmpfs -o "$1" none "$0" && echo mounted && exec cat > /dev/null"#;
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", script])
            .arg(folder.path())
            .arg(DISK)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut said = String::new();
        let mut lines = BufReader::new(holder.stdout.take().expect("its output"));
        lines.read_line(&mut said).expect("a line");
        assert_eq!(said, "mounted\n");
        Some(Self { holder, folder })
    }

    /// What runs a program where the disk is.
    fn inside(&self) -> Vec<String> {
        let namespace = format!("--mount=/proc/{}/ns/mnt", self.holder.id());
        vec!["nsenter".to_owned(), namespace, "--".to_owned()]
    }

    /// The disk as it is seen from here.
    fn path(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().strip_prefix("/").expect("from the root");
        PathBuf::from(format!("/proc/{}/root", self.holder.id()))
            .join(folder)
            .join(name)
    }

    fn data_dir(&self) -> String {
        format!("--data-dir={}", self.folder.path().join("data").display())
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.path("filler")).expect("a file");
        let full = loop {
            if let Err(error) = file.write_all(&[7; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        std::fs::remove_file(self.path("filler")).expect("the file that takes the room");
    }

    fn remount(&self, how: &str) {
        let inside = self.inside();
        let status = Command::new(&inside[0])
            .args(&inside[1..])
            .args(["mount", "-o", &format!("remount,{how}")])
            .arg(self.folder.path())
            .status()
            .expect("mount");
        assert!(status.success(), "remount,{how}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Creates a ConfigMap of some size: what was said when it was refused.
fn create(server: &Server, name: &str, bytes: usize) -> Result<(), String> {
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
        "data": {"filling": "x".repeat(bytes)}});
    let made = server.kubectl_with(&["create", "-f", "-"], &map.to_string());
    match made.status.success() {
        true => Ok(()),
        false => Err(text(&made.stderr)),
    }
}

#[test]
fn a_server_whose_disk_was_full_goes_on_when_there_is_room_again() {
    let Some(disk) = Disk::make() else { return };
    let server = Server::start_inside("api", vec![disk.data_dir()], disk.inside());
    server.kubectl("create configmap kept --from-literal=a=b");
    disk.fill();
    // The file has some room inside.
    let mut made = Vec::new();
    let refused = loop {
        let name = format!("filling-{}", made.len());
        match create(&server, &name, 400 << 10) {
            Ok(()) => made.push(name),
            Err(refused) => break refused,
        }
        assert!(made.len() < 100, "the disk takes everything");
    };
    assert!(refused.contains("No space left"), "{refused}");
    let again = create(&server, "refused", 400 << 10).expect_err("it is full");
    assert!(again.contains("the store cannot"), "{again}");
    assert_eq!(server.object("configmap kept")["data"]["a"], "b");
    disk.empty();
    let until = Instant::now() + PATIENCE;
    while let Err(refused) = create(&server, "after", 400 << 10) {
        assert!(Instant::now() < until, "{refused}");
    }
    made.extend(["kept".to_owned(), "after".to_owned()]);
    made.sort();
    let names = || {
        let all = server.kubectl("get configmaps --namespace default -o name");
        let names = all
            .lines()
            .filter_map(|line| line.strip_prefix("configmap/"));
        let names = names.filter(|name| *name != "kube-root-ca.crt");
        names.map(str::to_owned).collect::<Vec<String>>()
    };
    assert_eq!(names(), made);
    server.kill();
    server.launch();
    assert_eq!(names(), made, "what was answered, and nothing else");
}

#[test]
fn a_disk_that_cannot_be_written_to_is_named_at_start() {
    let Some(disk) = Disk::make() else { return };
    let server = Server::start_inside("api", vec![disk.data_dir()], disk.inside());
    server.kubectl("create configmap kept --from-literal=a=b");
    server.kill();
    disk.remount("ro");
    let said = server.refuses_to_start();
    assert!(
        said.contains("Read-only file system") && said.contains("state.redb"),
        "{said}"
    );
    disk.remount("rw");
    server.launch();
    assert_eq!(server.object("configmap kept")["data"]["a"], "b");
}
