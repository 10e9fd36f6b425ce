//! Which certificates a control plane has, and how they are renewed: by the authority, in their own files, each whole or not at all.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use rcgen::{Issuer, KeyPair};
use serde_json::Value;

use super::leaf::Leaf;
use super::reload::Source;
use super::{PkiError, file};

/// How often a control plane looks whether a certificate of its own is due.
const LOOK_PERIOD: Duration = Duration::from_secs(3600);
const AUTHORITY: &str = "ca";

/// A certificate of a control plane, under the name that `certs` has for it.
#[derive(Debug, Clone)]
pub struct Known {
    pub name: String,
    pub source: Source,
    pub leaf: Leaf,
}

/// Those that are there, the authority first; `kubeconfigs` are more files with one.
///
/// # Errors
/// When one cannot be read.
pub fn known(folder: &Path, kubeconfigs: &[PathBuf]) -> Result<Vec<Known>, PkiError> {
    let own = ["apiserver", "apiserver-kubelet-client"].map(|name| Source::files(folder, name));
    let parts = ["controllers", "scheduler"];
    let parts = parts.map(|name| Source::Kubeconfig(folder.join(format!("{name}.kubeconfig"))));
    let given = kubeconfigs.iter().cloned().map(Source::Kubeconfig);
    let mut found = vec![authority(folder)?];
    for source in own.into_iter().chain(parts).chain(given) {
        let path = match &source {
            Source::Files { certificate, .. } => certificate,
            Source::Kubeconfig(path) => path,
        };
        if !path.exists() {
            continue;
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        // The administrator's is called kubeconfig and nothing else.
        let name = match stem.as_ref() {
            "kubeconfig" => "admin".to_owned(),
            stem => stem.to_owned(),
        };
        // One that names files has its certificate from somebody else.
        if !source.holds_certificate()? {
            continue;
        }
        let (certificate, _) = source.read()?;
        let leaf = leaf(path, &certificate)?;
        found.push(Known { name, source, leaf });
    }
    Ok(found)
}

fn authority(folder: &Path) -> Result<Known, PkiError> {
    let path = folder.join("ca.crt");
    let pem = fs::read(&path).map_err(file("read", &path))?;
    Ok(Known {
        name: AUTHORITY.to_owned(),
        leaf: leaf(&path, &pem)?,
        source: Source::files(folder, AUTHORITY),
    })
}

fn leaf(path: &Path, pem: &[u8]) -> Result<Leaf, PkiError> {
    let unusable = |reason: String| PkiError::Unusable {
        path: path.to_owned(),
        reason,
    };
    Leaf::of_pem(pem).map_err(unusable)
}

/// The key of the authority, and its certificate.
fn issuer(folder: &Path) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let (certificate, key) = (folder.join("ca.crt"), folder.join("ca.key"));
    if !key.exists() {
        return Err(PkiError::NoKey(key));
    }
    let read = |path: &Path| fs::read_to_string(path).map_err(file("read", path));
    let unusable = |error: rcgen::Error| PkiError::Unusable {
        path: key.clone(),
        reason: error.to_string(),
    };
    let pair = KeyPair::from_pem(&read(&key)?).map_err(unusable)?;
    Issuer::from_ca_cert_pem(&read(&certificate)?, pair).map_err(unusable)
}

/// Renews those named, or all but the authority when none is. Gives the names of those renewed.
///
/// # Errors
/// When one is not known, or cannot be signed or written; those before it are renewed then.
pub fn renew(
    folder: &Path,
    kubeconfigs: &[PathBuf],
    names: &[String],
    now: Timestamp,
) -> Result<Vec<String>, PkiError> {
    let all = known(folder, kubeconfigs)?;
    if let Some(name) = names.iter().find(|name| *name == AUTHORITY) {
        return Err(PkiError::Authority(name.clone()));
    }
    let unknown = |name: &&String| !all.iter().any(|known| known.name == **name);
    if let Some(name) = names.iter().find(unknown) {
        return Err(PkiError::Unknown(name.clone()));
    }
    let issuer = issuer(folder)?;
    let mut renewed = Vec::new();
    for known in all.iter().filter(|known| known.name != AUTHORITY) {
        if names.is_empty() || names.contains(&known.name) {
            renew_one(known, &issuer, now)?;
            renewed.push(known.name.clone());
        }
    }
    Ok(renewed)
}

fn renew_one(known: &Known, issuer: &Issuer<'_, KeyPair>, now: Timestamp) -> Result<(), PkiError> {
    let signed = known.leaf.renewed(issuer, now);
    match &known.source {
        Source::Files { certificate, key } => {
            let (new, new_key) = signed.map_err(|error| unusable(certificate, &error))?;
            // Between the two renames they do not belong together: readers keep what they have until they do.
            replace(key, new_key.as_bytes())?;
            replace(certificate, new.as_bytes())
        }
        Source::Kubeconfig(path) => {
            let (new, new_key) = signed.map_err(|error| unusable(path, &error))?;
            let text = fs::read(path).map_err(file("read", path))?;
            let mut config: Value =
                serde_saphyr::from_slice(&text).map_err(|error| unusable(path, &error))?;
            let user = config.pointer_mut("/users/0/user");
            let user = user.and_then(Value::as_object_mut);
            let user = user.ok_or_else(|| unusable(path, &"it has no user"))?;
            for (field, pem) in [
                ("client-certificate-data", new),
                ("client-key-data", new_key),
            ] {
                user.insert(field.to_owned(), BASE64_STANDARD.encode(pem).into());
            }
            let text = serde_saphyr::to_string(&config).map_err(|error| unusable(path, &error))?;
            replace(path, text.as_bytes())
        }
    }
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> PkiError {
    PkiError::Unusable {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// Replaces a file that only its owner may read.
fn replace(path: &Path, contents: &[u8]) -> Result<(), PkiError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || {
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        out.write_all(contents)?;
        out.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(file("replace", path))
}

/// Renews what is in the last third of its life, now and from then on. Where the authority's key is not, or the folder cannot be
/// written to, somebody else does that.
pub async fn keep(folder: PathBuf) {
    loop {
        match renew_due(&folder) {
            Ok(names) if names.is_empty() => {}
            Ok(names) => tracing::info!(?names, "certificates were renewed"),
            Err(PkiError::NoKey(_)) => return,
            Err(error) => tracing::warn!(%error, "certificates that are due cannot be renewed"),
        }
        tokio::time::sleep(LOOK_PERIOD).await;
    }
}

fn renew_due(folder: &Path) -> Result<Vec<String>, PkiError> {
    let now = Timestamp::now();
    let due: Vec<String> = known(folder, &[])?
        .into_iter()
        .filter(|known| known.name != AUTHORITY && known.leaf.life.is_due(now.as_second()))
        .map(|known| known.name)
        .collect();
    if due.is_empty() {
        return Ok(due);
    }
    renew(folder, &[], &due, now)
}
