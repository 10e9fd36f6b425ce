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

use super::authorities::signing;
use super::leaf::Leaf;
use super::reload::Source;
use super::{PkiError, file};

/// How often a control plane looks whether a certificate of its own is due.
const LOOK_PERIOD: Duration = Duration::from_secs(3600);
/// The cluster's, and that of its etcd, where control planes bring the members.
const AUTHORITY: &str = "ca";
const ETCD_AUTHORITY: &str = "etcd-ca";
const AUTHORITIES: [&str; 2] = [AUTHORITY, ETCD_AUTHORITY];
/// What the API server shows its clients, and what kubelets.
const OF_CLUSTER: [&str; 2] = ["apiserver", "apiserver-kubelet-client"];
/// What etcd's members show, as servers and to each other, and what they are shown by control planes.
const OF_ETCD: [&str; 2] = ["etcd", "etcd-client"];

/// A certificate of a control plane, under the name that `certs` has for it.
#[derive(Debug, Clone)]
pub struct Known {
    pub name: String,
    pub source: Source,
    pub leaf: Leaf,
    /// The name of the authority that signs it.
    signer: &'static str,
}

impl Known {
    fn is_authority(&self) -> bool {
        AUTHORITIES.contains(&self.name.as_str())
    }
}

/// Those that are there, an authority before what it signs; `kubeconfigs` are more files with one.
///
/// # Errors
/// When one cannot be read.
pub fn known(folder: &Path, kubeconfigs: &[PathBuf]) -> Result<Vec<Known>, PkiError> {
    let own = OF_CLUSTER.map(|name| Source::files(folder, name));
    let parts = ["controllers", "scheduler"];
    let parts = parts.map(|name| Source::Kubeconfig(folder.join(format!("{name}.kubeconfig"))));
    let given = kubeconfigs.iter().cloned().map(Source::Kubeconfig);
    let mut found = vec![authority(folder, AUTHORITY)?];
    let of_cluster = own.into_iter().chain(parts).chain(given);
    let of_cluster = of_cluster.map(|source| (source, AUTHORITY));
    let of_etcd = OF_ETCD.map(|name| (Source::files(folder, name), ETCD_AUTHORITY));
    for (source, signer) in of_cluster.chain(of_etcd) {
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
        found.push(Known {
            name,
            source,
            leaf,
            signer,
        });
    }
    let first = found
        .iter()
        .position(|known| known.signer == ETCD_AUTHORITY);
    if let (Some(at), true) = (first, key_of(folder, ETCD_AUTHORITY).exists()) {
        found.insert(at, authority(folder, ETCD_AUTHORITY)?);
    }
    Ok(found)
}

fn authority(folder: &Path, signer: &'static str) -> Result<Known, PkiError> {
    let path = folder.join(format!("{signer}.crt"));
    let pem = fs::read(&path).map_err(file("read", &path))?;
    Ok(Known {
        name: signer.to_owned(),
        leaf: leaf(&path, &pem)?,
        source: Source::files(folder, signer),
        signer,
    })
}

fn key_of(folder: &Path, signer: &str) -> PathBuf {
    folder.join(format!("{signer}.key"))
}

fn leaf(path: &Path, pem: &[u8]) -> Result<Leaf, PkiError> {
    let unusable = |reason: String| PkiError::Unusable {
        path: path.to_owned(),
        reason,
    };
    Leaf::of_pem(pem).map_err(unusable)
}

/// The key of an authority, and its certificate.
fn issuer(folder: &Path, signer: &str) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let (certificate, key) = (folder.join(format!("{signer}.crt")), key_of(folder, signer));
    if !key.exists() {
        return Err(PkiError::NoKey(key));
    }
    let read = |path: &Path| fs::read_to_string(path).map_err(file("read", path));
    signing(&read(&certificate)?, &read(&key)?).map_err(|reason| PkiError::Unusable {
        path: key.clone(),
        reason,
    })
}

/// Renews those named; when none is, all but the authorities and what another etcd's authority signs, whose key is elsewhere. Gives the
/// names of those renewed.
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
    if let Some(name) = names
        .iter()
        .find(|name| AUTHORITIES.contains(&name.as_str()))
    {
        return Err(PkiError::Authority(name.clone()));
    }
    let unknown = |name: &&String| !all.iter().any(|known| known.name == **name);
    if let Some(name) = names.iter().find(unknown) {
        return Err(PkiError::Unknown(name.clone()));
    }
    let mut renewed = Vec::new();
    for signer in AUTHORITIES {
        let wanted = |known: &&Known| {
            known.signer == signer
                && !known.is_authority()
                && (names.is_empty() || names.contains(&known.name))
        };
        let mut wanted = all.iter().filter(wanted).peekable();
        if wanted.peek().is_none() {
            continue;
        }
        let issuer = match issuer(folder, signer) {
            Err(PkiError::NoKey(_)) if names.is_empty() && signer == ETCD_AUTHORITY => continue,
            issuer => issuer?,
        };
        for known in wanted {
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
            // Between the two renames, which follow one another at once, they do not belong together: readers keep what they have until
            // they do, and a handshake of etcd, which reads both each time, is tried again.
            let new_key = prepare(key, new_key.as_bytes())?;
            let new = prepare(certificate, new.as_bytes())?;
            put(&new_key, key)?;
            put(&new, certificate)
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
            put(&prepare(path, text.as_bytes())?, path)
        }
    }
}

/// Finishes the renewal of a pair that was cut off between its two renames: the certificate that fits the key lies beside.
pub fn finish(folder: &Path) {
    for name in OF_CLUSTER.into_iter().chain(OF_ETCD) {
        let Source::Files { certificate, key } = Source::files(folder, name) else {
            continue;
        };
        let new = beside(&certificate);
        let fits = |path: &Path| {
            let source = Source::Files {
                certificate: path.to_owned(),
                key: key.clone(),
            };
            source.is_pair()
        };
        if new.exists() && !fits(&certificate) && fits(&new) {
            match put(&new, &certificate) {
                Ok(()) => tracing::info!(name, "a renewal that was cut off is finished"),
                Err(error) => tracing::warn!(%error, "a renewal that was cut off stays so"),
            }
        }
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    PathBuf::from(new)
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> PkiError {
    PkiError::Unusable {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// Writes what is to be a file that only its owner may read, beside it.
fn prepare(path: &Path, contents: &[u8]) -> Result<PathBuf, PkiError> {
    let new = beside(path);
    let write = || {
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        out.write_all(contents)?;
        out.sync_all()
    };
    write().map_err(file("replace", path))?;
    Ok(new)
}

fn put(new: &Path, path: &Path) -> Result<(), PkiError> {
    fs::rename(new, path).map_err(file("replace", path))
}

/// Renews what is in the last third of its life, now and from then on. Where an authority's key is not, or the folder cannot be written
/// to, somebody else does that.
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
        .filter(|known| !known.is_authority() && known.leaf.life.is_due(now.as_second()))
        .filter(|known| known.signer == AUTHORITY || key_of(folder, known.signer).exists())
        .map(|known| known.name)
        .collect();
    if due.is_empty() {
        return Ok(due);
    }
    renew(folder, &[], &due, now)
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa,
        PublicKeyData,
    };

    use super::*;

    /// A folder with both authorities, and a pair that each has signed long ago.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
        for (signer, leaf) in [
            ("ca", "apiserver"),
            ("etcd-ca", "etcd"),
            ("etcd-ca", "etcd-client"),
        ] {
            let mut authority = CertificateParams::default();
            authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = folder.path().join(format!("{signer}.key"));
            let key = fs::read_to_string(key).map(|pem| KeyPair::from_pem(&pem).unwrap());
            let key = key.unwrap_or_else(|_| KeyPair::generate().unwrap());
            write(&format!("{signer}.key"), key.serialize_pem());
            let issuer = CertifiedIssuer::self_signed(authority, key).unwrap();
            write(&format!("{signer}.crt"), issuer.pem());
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &issuer).unwrap();
            write(&format!("{leaf}.crt"), certificate.pem());
            write(&format!("{leaf}.key"), key.serialize_pem());
        }
        folder
    }

    fn names(known: &[Known]) -> Vec<&str> {
        known.iter().map(|known| known.name.as_str()).collect()
    }

    #[test]
    fn each_is_renewed_by_its_own_authority_with_a_new_key() {
        let folder = folder();
        let path = folder.path();
        let all = known(path, &[]).unwrap();
        assert_eq!(
            names(&all),
            ["ca", "apiserver", "etcd-ca", "etcd", "etcd-client"]
        );
        let before: Vec<_> = all
            .iter()
            .map(|known| known.source.read().unwrap())
            .collect();
        assert_eq!(
            renew_due(path).unwrap(),
            ["apiserver", "etcd", "etcd-client"]
        );
        assert!(renew_due(path).unwrap().is_empty());
        let now = Timestamp::now().as_second();
        for (known, (certificate, key)) in known(path, &[]).unwrap().iter().zip(before) {
            let (new, new_key) = known.source.read().unwrap();
            if known.is_authority() {
                assert!((new, new_key) == (certificate, key), "{} stays", known.name);
                continue;
            }
            assert!(new != certificate && new_key != key, "{}", known.name);
            assert!(!known.leaf.life.is_due(now) && known.leaf.names == ["localhost"]);
            assert!(known.leaf.client && known.leaf.server);
            let parse = |pem: &[u8]| x509_parser::pem::parse_x509_pem(pem).unwrap().1;
            let authority = fs::read(path.join(format!("{}.crt", known.signer))).unwrap();
            let (authority, new) = (parse(&authority), parse(&new));
            let authority = authority.parse_x509().unwrap();
            let new = new.parse_x509().unwrap();
            new.verify_signature(Some(authority.public_key())).unwrap();
            let pair = KeyPair::from_pem(std::str::from_utf8(&new_key).unwrap()).unwrap();
            assert_eq!(new.public_key().raw, pair.subject_public_key_info());
        }
    }

    #[test]
    fn a_renewal_that_was_cut_off_between_its_renames_is_finished() {
        let folder = folder();
        let path = folder.path();
        let before: Vec<Known> = known(path, &[]).unwrap();
        let etcd = before.iter().find(|known| known.name == "etcd").unwrap();
        let old = fs::read(path.join("etcd.crt")).unwrap();
        renew(path, &[], &["etcd".to_owned()], Timestamp::now()).unwrap();
        let new = fs::read(path.join("etcd.crt")).unwrap();
        fs::write(path.join("etcd.crt.new"), &new).unwrap();
        fs::write(path.join("etcd.crt"), &old).unwrap();
        assert!(!etcd.source.is_pair());
        finish(path);
        assert!(etcd.source.is_pair());
        assert_eq!(fs::read(path.join("etcd.crt")).unwrap(), new);
        // One that was cut off before them is not.
        fs::write(path.join("etcd.crt.new"), &old).unwrap();
        finish(path);
        assert_eq!(fs::read(path.join("etcd.crt")).unwrap(), new);
    }

    #[test]
    fn what_another_etcd_has_signed_is_left_to_it() {
        let folder = folder();
        let path = folder.path();
        fs::remove_file(path.join("etcd-ca.key")).unwrap();
        let all = known(path, &[]).unwrap();
        assert_eq!(names(&all), ["ca", "apiserver", "etcd", "etcd-client"]);
        assert_eq!(renew_due(path).unwrap(), ["apiserver"]);
        let now = Timestamp::now();
        assert_eq!(renew(path, &[], &[], now).unwrap(), ["apiserver"]);
        let named = renew(path, &[], &["etcd".to_owned()], now);
        assert!(matches!(named, Err(PkiError::NoKey(_))));
        for authority in AUTHORITIES {
            let named = renew(path, &[], &[authority.to_owned()], now);
            assert!(matches!(named, Err(PkiError::Authority(_))), "{authority}");
        }
        let unknown = renew(path, &[], &["nobody".to_owned()], now);
        assert!(matches!(unknown, Err(PkiError::Unknown(_))));
    }
}
