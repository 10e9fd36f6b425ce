//! Kubeconfig files: one of our own per client, and our context in the user's.
//!
//! A user's file is edited as a tree, so what we do not know stays in it. Which file, and how it is locked and replaced,
//! follows kubectl and kind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use crate::pki::Credential;

#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    #[error("cannot {action} {path}: {source}")]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is not a kubeconfig: {reason}; it was left as it is")]
    NotOne { path: PathBuf, reason: String },
    #[error("{path} is locked by another program ({lock} exists); if none runs, remove that file")]
    Locked { path: PathBuf, lock: PathBuf },
    #[error("there is no home folder to put .kube/config in; set KUBECONFIG")]
    NoHome,
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KubeconfigError {
    let path = path.to_owned();
    move |source| KubeconfigError::File {
        action,
        path,
        source,
    }
}

/// The context, cluster and user of a Keelway cluster in a kubeconfig.
pub fn context_name(cluster: &str) -> String {
    format!("keelway-{cluster}")
}

/// A kubeconfig with one context, `name`, which is selected.
pub fn single(name: &str, server: &str, ca: &str, client: &Credential) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": name, "cluster": { "server": server, "certificate-authority-data": BASE64_STANDARD.encode(ca) } }],
        "contexts": [{ "name": name, "context": { "cluster": name, "user": name } }],
        "current-context": name,
        "users": [{ "name": name, "user": {
            "client-certificate-data": BASE64_STANDARD.encode(&client.certificate),
            "client-key-data": BASE64_STANDARD.encode(&client.key),
        } }],
    })
}

/// A kubeconfig that says where a cluster is and whom to trust there, and nothing of its reader.
pub fn without_credentials(server: &str, ca: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "", "cluster": { "server": server, "certificate-authority-data": BASE64_STANDARD.encode(ca) } }],
        "contexts": [],
        "current-context": "",
        "users": [],
    })
}

/// `config` as YAML.
pub fn to_yaml(config: &Value) -> String {
    // A JSON value has no shape that YAML lacks.
    serde_saphyr::to_string(config).unwrap_or_else(|_| config.to_string())
}

const LISTS: [&str; 3] = ["clusters", "contexts", "users"];

/// `into` with the entries of `ours` added, or replaced where they have the same name, and its context selected.
fn merged(mut into: Map<String, Value>, ours: &Value) -> Map<String, Value> {
    for (key, value) in [("apiVersion", "v1"), ("kind", "Config")] {
        into.entry(key).or_insert_with(|| value.into());
    }
    for list in LISTS {
        let additions = ours
            .get(list)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        // kubectl writes an empty list as null.
        let entry = into.entry(list).or_insert(Value::Null);
        if !entry.is_array() {
            *entry = json!([]);
        }
        let Some(entries) = entry.as_array_mut() else {
            continue;
        };
        for addition in additions {
            match entries
                .iter_mut()
                .find(|entry| entry.get("name") == addition.get("name"))
            {
                Some(same) => *same = addition,
                None => entries.push(addition),
            }
        }
    }
    into.insert(
        "current-context".into(),
        ours.get("current-context").cloned().unwrap_or_default(),
    );
    into
}

/// `from` without the entries called `name`; None when it has none.
fn without(mut from: Map<String, Value>, name: &str) -> Option<Map<String, Value>> {
    let mut changed = false;
    for list in LISTS {
        if let Some(entries) = from.get_mut(list).and_then(Value::as_array_mut) {
            let before = entries.len();
            entries.retain(|entry| entry.get("name").and_then(Value::as_str) != Some(name));
            changed |= entries.len() != before;
        }
    }
    if from.get("current-context").and_then(Value::as_str) == Some(name) {
        from.insert("current-context".into(), "".into());
        changed = true;
    }
    changed.then_some(from)
}

/// Where kubeconfigs are, from the values of $KUBECONFIG and $HOME.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files(Vec<PathBuf>);

impl Files {
    /// # Errors
    /// When neither variable says anything.
    pub fn from_environment() -> Result<Self, KubeconfigError> {
        Self::parse(
            std::env::var_os("KUBECONFIG").as_deref(),
            std::env::var_os("HOME").as_deref(),
        )
    }

    fn parse(
        kubeconfig: Option<&std::ffi::OsStr>,
        home: Option<&std::ffi::OsStr>,
    ) -> Result<Self, KubeconfigError> {
        let named: Vec<PathBuf> = kubeconfig
            .map(|list| {
                std::env::split_paths(list)
                    .filter(|path| !path.as_os_str().is_empty())
                    .collect()
            })
            .unwrap_or_default();
        if !named.is_empty() {
            return Ok(Files(named));
        }
        match home {
            Some(home) if !home.is_empty() => Ok(Files(vec![Path::new(home).join(".kube/config")])),
            _ => Err(KubeconfigError::NoHome),
        }
    }

    /// The file that a new context goes to: the first that exists, else the last one named, as kind does.
    pub fn for_writing(&self) -> &Path {
        let existing = self.0.iter().find(|path| path.exists());
        existing
            .or(self.0.last())
            .map_or(Path::new(""), PathBuf::as_path)
    }

    pub fn all(&self) -> &[PathBuf] {
        &self.0
    }
}

/// Adds `ours` to the file at `path`, which is made when missing, and selects its context.
///
/// # Errors
/// When the file is no kubeconfig, is locked, or cannot be written; it is unchanged then.
pub fn merge_into(path: &Path, ours: &Value) -> Result<(), KubeconfigError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(file("make", folder))?;
    }
    let _lock = Lock::take(path)?;
    let config = merged(read(path)?.unwrap_or_default(), ours);
    write(path, &Value::Object(config))
}

/// Takes the entries called `name` out of the file at `path`. A file that is missing or has none is left alone.
///
/// # Errors
/// As [`merge_into`].
pub fn remove_from(path: &Path, name: &str) -> Result<(), KubeconfigError> {
    if !path.exists() {
        return Ok(());
    }
    let _lock = Lock::take(path)?;
    match read(path)?.and_then(|config| without(config, name)) {
        Some(config) if is_empty(&config) => fs::remove_file(path).map_err(file("remove", path)),
        Some(config) => write(path, &Value::Object(config)),
        None => Ok(()),
    }
}

/// Whether nothing is left that a user would miss.
fn is_empty(config: &Map<String, Value>) -> bool {
    config.iter().all(|(key, value)| match key.as_str() {
        "apiVersion" | "kind" => true,
        _ => match value {
            Value::Array(entries) => entries.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            Value::String(text) => text.is_empty(),
            other => other.is_null(),
        },
    })
}

fn read(path: &Path) -> Result<Option<Map<String, Value>>, KubeconfigError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(file("read", path)(error)),
    };
    if text.trim().is_empty() {
        return Ok(None);
    }
    let not_one = |reason: String| KubeconfigError::NotOne {
        path: path.to_owned(),
        reason,
    };
    match serde_saphyr::from_str::<Value>(&text).map_err(|error| not_one(error.to_string()))? {
        Value::Object(config) => Ok(Some(config)),
        _ => Err(not_one("its top level is not a mapping".into())),
    }
}

/// Replaces the file by rename, readable by its owner only, and owned by whom it was (or who owns the folder), so that a
/// file of a user stays theirs under sudo.
fn write(path: &Path, config: &Value) -> Result<(), KubeconfigError> {
    // A link stays a link: what it points to is replaced.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let new = with_suffix(&target, ".keelway-new");
    let mut out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .map_err(file("write", &new))?;
    let owner =
        fs::metadata(&target).or_else(|_| fs::metadata(target.parent().unwrap_or(Path::new("/"))));
    if let Ok(owner) = owner {
        drop(chown(&new, Some(owner.uid()), Some(owner.gid())));
    }
    out.write_all(to_yaml(config).as_bytes())
        .and_then(|()| out.sync_all())
        .map_err(file("write", &new))?;
    fs::rename(&new, &target).map_err(file("replace", &target))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// `<file>.lock`, made exclusively, the way client-go locks kubeconfigs.
#[derive(Debug)]
struct Lock(PathBuf);

impl Lock {
    fn take(path: &Path) -> Result<Self, KubeconfigError> {
        let lock = with_suffix(path, ".lock");
        for _ in 0..50 {
            match File::create_new(&lock) {
                Ok(_) => return Ok(Lock(lock)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // Held for milliseconds by whoever edits the file; nothing tells when it is let go.
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                Err(error) => return Err(file("lock", path)(error)),
            }
        }
        Err(KubeconfigError::Locked {
            path: path.to_owned(),
            lock,
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::fs::PermissionsExt;

    fn ours() -> Value {
        let client = Credential {
            certificate: "CERT".into(),
            key: "KEY".into(),
        };
        single("keelway-dev", "https://127.0.0.1:4000", "CA", &client)
    }

    fn parse(yaml: &str) -> Value {
        serde_saphyr::from_str(yaml).expect("YAML")
    }

    const THEIRS: &str = r#"apiVersion: v1
kind: Config
preferences: {colors: true}
current-context: prod
clusters:
- name: prod
  cluster: {server: "https://prod:6443", proxy-url: "http://p"}
contexts:
- name: prod
  context: {cluster: prod, user: me, namespace: "1234"}
users:
- name: me
  user: {token: "007", exec: {apiVersion: client.authentication.k8s.io/v1, args: ["-y", "on"]}}
extensions:
- name: theirs
"#;

    #[test]
    fn a_merge_keeps_what_was_there_and_selects_ours() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        fs::write(&path, THEIRS).expect("written");
        merge_into(&path, &ours()).expect("merged");
        merge_into(&path, &ours()).expect("merging again replaces");
        let config = parse(&fs::read_to_string(&path).expect("read"));
        assert_eq!(config["current-context"], "keelway-dev");
        assert_eq!(config["clusters"].as_array().map(Vec::len), Some(2));
        assert_eq!(
            config["users"][0],
            parse(THEIRS)["users"][0],
            "strings that look like numbers or booleans stay strings"
        );
        assert_eq!(config["contexts"][0]["context"]["namespace"], "1234");
        assert_eq!(config["extensions"][0]["name"], "theirs");
        assert_eq!(
            fs::metadata(&path).expect("there").permissions().mode() & 0o777,
            0o600
        );
        remove_from(&path, "keelway-dev").expect("removed");
        let mut expected = parse(THEIRS);
        expected["current-context"] = "".into();
        assert_eq!(parse(&fs::read_to_string(&path).expect("read")), expected);
    }

    #[test]
    fn a_file_that_was_made_for_us_goes_with_us() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(".kube/config");
        merge_into(&path, &ours()).expect("made");
        assert_eq!(parse(&fs::read_to_string(&path).expect("read")), ours());
        remove_from(&path, "keelway-dev").expect("removed");
        assert!(!path.exists());
        remove_from(&path, "keelway-dev").expect("a missing file is fine");
    }

    #[test]
    fn a_selected_context_of_the_user_stays_selected_when_ours_goes() {
        let mut config = merged(
            parse(THEIRS).as_object().cloned().unwrap_or_default(),
            &ours(),
        );
        config.insert("current-context".into(), "prod".into());
        let config = without(config, "keelway-dev").expect("it was there");
        assert_eq!(config["current-context"], "prod");
        assert!(without(config, "keelway-dev").is_none());
    }

    #[test]
    fn a_file_that_is_no_kubeconfig_is_left_as_it_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config");
        for text in ["- a\n- b\n", "{", "a: b: c"] {
            fs::write(&path, text).expect("written");
            assert!(
                matches!(
                    merge_into(&path, &ours()),
                    Err(KubeconfigError::NotOne { .. })
                ),
                "{text}"
            );
            assert_eq!(fs::read_to_string(&path).expect("read"), text);
        }
        assert!(!with_suffix(&path, ".lock").exists(), "the lock is let go");
    }

    #[test]
    fn null_lists_as_kubectl_writes_them_are_filled() {
        let theirs = parse("apiVersion: v1\nclusters: null\ncontexts: null\nusers: null\n");
        let config = merged(theirs.as_object().cloned().unwrap_or_default(), &ours());
        assert_eq!(config["users"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn files_follow_kubeconfig_then_home() {
        let files = |kubeconfig: Option<&str>, home: Option<&str>| {
            Files::parse(kubeconfig.map(OsStr::new), home.map(OsStr::new))
        };
        assert_eq!(
            files(None, Some("/h")).expect("home").for_writing(),
            Path::new("/h/.kube/config")
        );
        assert_eq!(
            files(Some(""), Some("/h")).expect("home").for_writing(),
            Path::new("/h/.kube/config")
        );
        assert_eq!(
            files(Some("/none/a:/none/b"), None)
                .expect("list")
                .for_writing(),
            Path::new("/none/b")
        );
        assert_eq!(
            files(Some("/none/a:/etc/passwd:/none/b"), None)
                .expect("list")
                .for_writing(),
            Path::new("/etc/passwd")
        );
        assert!(matches!(files(None, None), Err(KubeconfigError::NoHome)));
    }
}
