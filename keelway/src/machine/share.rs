//! What a machine needs to become another control plane: the cluster's authority, the key of ServiceAccounts, and where its state is. A
//! control plane keeps it in the cluster for two hours, sealed by a key that only those have who are told it (as `kubeadm init phase
//! upload-certs`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use super::MachineDir;
use super::member;
use super::token::{self, CONTROL_PLANE_GROUP, GROUP, Token, TokenError};
use crate::etcd;
use crate::node::NodeSpec;

const NAMESPACE: &str = "kube-system";
/// The Secret; deploy/join.yaml lets [`CONTROL_PLANE_GROUP`] read it.
pub const NAME: &str = "keelway-certs";
const FIELD: &str = "sealed";
const LIFE: Duration = Duration::from_secs(2 * 3600);
/// Files of the folder of credentials that control planes share.
const FILES: [&str; 4] = ["ca.crt", "ca.key", "sa.key", "sa.pub"];
/// Those that there are with some stores, and where `server` was given them.
const SOME_FILES: [&str; 6] = [
    etcd::CA,
    etcd::CLIENT[0],
    etcd::CLIENT[1],
    member::CA_KEY,
    ENCRYPTION,
    AUDIT_POLICY,
];
/// What is kept sealed and by which keys, and which requests are told of in the audit log: all control planes have the same.
pub const ENCRYPTION: &str = "encryption.yaml";
pub const AUDIT_POLICY: &str = "audit.yaml";
const EMBEDDED: &str = "--data-dir";

#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("this machine is no control plane: its keys are given away where they are")]
    NoControlPlane,
    #[error("{}", NOT_SHARED)]
    NotShared,
    #[error("cannot read {0}: {1}")]
    Read(String, std::io::Error),
    #[error(
        "{0:?} is no key of certificates: one is of 64 hexadecimal digits, as `keelway token create --control-plane` prints it"
    )]
    Key(String),
    #[error(
        "a key of certificates is no argument, which everybody on the machine can read: --certificate-key names a file with it, or `-` for standard input"
    )]
    Told,
    #[error("this machine has no randomness, or its keys cannot be sealed")]
    Seal,
    #[error(
        "the cluster's keys cannot be opened with the --certificate-key given: it is another token's"
    )]
    Open,
    #[error(
        "the cluster offers its keys no more: `keelway token create --control-plane` does, for two hours"
    )]
    Gone,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("cannot {action}: {source}")]
    Api {
        action: &'static str,
        source: Box<kube::Error>,
    },
}

/// What is said where a second control plane would have no state to work on.
pub const NOT_SHARED: &str = "this cluster keeps its state in the embedded store, which is of one control plane. Move it to etcd first, on the \
    control plane: `keelway start --store etcd` begins an etcd of its own for it; for one that is there, `keelway stop`, then `keelway store migrate --from \
    embedded:/var/lib/keelway/machine/node/var/lib/keelway/controlplane --to etcd:URL[,URL...]`, then `keelway start --store etcd:URL[,URL...]`";

/// The key that seals, in hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct SealingKey([u8; 32]);

impl std::fmt::Display for SealingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for SealingKey {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let bad = || ShareError::Key(text.chars().take(4).collect::<String>() + "...");
        if text.len() != 64 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(SealingKey(bytes))
    }
}

impl SealingKey {
    /// Reads the key from a file, or from the next line of standard input, which `-` stands for.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(from: &str) -> Result<Self, ShareError> {
        if from.parse::<Self>().is_ok() {
            return Err(ShareError::Told);
        }
        let mut text = String::new();
        let read = match from {
            "-" => std::io::stdin().read_line(&mut text).map(drop),
            path => fs::read_to_string(path).map(|read| text = read),
        };
        read.map_err(|error| ShareError::Read(from.to_owned(), error))?;
        text.trim().parse()
    }

    fn new() -> Result<Self, ShareError> {
        let mut bytes = [0; 32];
        let filled = SystemRandom::new().fill(&mut bytes);
        filled.map_err(|_| ShareError::Seal)?;
        Ok(SealingKey(bytes))
    }

    fn cipher(&self) -> Result<LessSafeKey, ShareError> {
        let key = UnboundKey::new(&AES_256_GCM, &self.0).map_err(|_| ShareError::Seal)?;
        Ok(LessSafeKey::new(key))
    }

    fn seal(&self, text: &[u8]) -> Result<Vec<u8>, ShareError> {
        let mut nonce = [0; NONCE_LEN];
        let filled = SystemRandom::new().fill(&mut nonce);
        filled.map_err(|_| ShareError::Seal)?;
        let mut sealed = text.to_vec();
        let unique = Nonce::assume_unique_for_key(nonce);
        let done = self
            .cipher()?
            .seal_in_place_append_tag(unique, Aad::from(NAME), &mut sealed);
        done.map_err(|_| ShareError::Seal)?;
        Ok([&nonce[..], &sealed].concat())
    }

    fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, ShareError> {
        let (nonce, text) = sealed.split_at_checked(NONCE_LEN).ok_or(ShareError::Open)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| ShareError::Open)?;
        let mut text = text.to_vec();
        let opened = self
            .cipher()?
            .open_in_place(nonce, Aad::from(NAME), &mut text);
        Ok(opened.map_err(|_| ShareError::Open)?.to_vec())
    }
}

/// What control planes share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shared {
    /// The flags of the store.
    pub store: Vec<String>,
    pub files: BTreeMap<String, String>,
}

/// The flags of the control plane in a node's description that say where its state is.
pub fn store_flags(spec: &NodeSpec) -> Option<Vec<String>> {
    let service = spec
        .services
        .iter()
        .find(|service| service.name == "controlplane")?;
    let pairs = service.argv.windows(2);
    let of_store = pairs.filter(|pair| is_store_flag(&pair[0]));
    Some(of_store.flatten().cloned().collect())
}

pub fn is_store_flag(flag: &str) -> bool {
    flag == EMBEDDED || flag == "--store" || flag.starts_with("--etcd-")
}

impl Shared {
    /// What this machine, a control plane, has to share.
    ///
    /// # Errors
    /// When it is none, or has a store that cannot be shared.
    pub fn of(dir: &MachineDir) -> Result<Self, ShareError> {
        let text = fs::read(dir.spec()).map_err(|_| ShareError::NoControlPlane)?;
        let spec: NodeSpec =
            serde_json::from_slice(&text).map_err(|_| ShareError::NoControlPlane)?;
        let store = store_flags(&spec).ok_or(ShareError::NoControlPlane)?;
        if store.iter().any(|flag| flag == EMBEDDED) {
            return Err(ShareError::NotShared);
        }
        let folder = dir.credentials();
        let read = |name: &str| {
            let path = folder.join(name);
            let text = fs::read_to_string(&path);
            text.map_err(|error| ShareError::Read(path.display().to_string(), error))
        };
        let there = |name: &&&str| folder.join(name).exists();
        let names = FILES.iter().chain(SOME_FILES.iter().filter(there));
        let files = names.map(|name| Ok(((*name).to_owned(), read(name)?)));
        Ok(Shared {
            store,
            files: files.collect::<Result<_, ShareError>>()?,
        })
    }

    /// Whether each control plane brings a member of the etcd that keeps the state.
    pub fn brings_members(&self) -> bool {
        self.files.contains_key(member::CA_KEY)
    }

    pub fn file(&self, name: &str) -> &str {
        self.files.get(name).map_or("", String::as_str)
    }

    /// The files that go beside a control plane's own, as they are.
    pub fn beside(&self) -> impl Iterator<Item = (&str, &str)> {
        let some = SOME_FILES.iter();
        some.filter_map(|name| Some((*name, self.files.get(*name)?.as_str())))
    }

    /// Makes the cluster know the token, and keep what is shared as long as that; gives the key that opens it.
    ///
    /// # Errors
    /// What the cluster says.
    pub async fn offer(
        &self,
        client: Client,
        token: &Token,
        description: &str,
    ) -> Result<SealingKey, ShareError> {
        let key = SealingKey::new()?;
        let text = serde_json::to_vec(self).map_err(|_| ShareError::Seal)?;
        let sealed = key.seal(&text)?;
        let groups = [GROUP, CONTROL_PLANE_GROUP];
        let known =
            token::create(client.clone(), token, Some(LIFE), (description, &groups)).await?;
        // It goes with the token, which the cluster removes when it has expired.
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Secret".to_owned(),
            name: known.metadata.name.unwrap_or_default(),
            uid: known.metadata.uid.unwrap_or_default(),
            ..OwnerReference::default()
        };
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                namespace: Some(NAMESPACE.to_owned()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            data: Some([(FIELD.to_owned(), ByteString(sealed))].into()),
            ..Secret::default()
        };
        let api: Api<Secret> = Api::namespaced(client, NAMESPACE);
        let failed = |error| ShareError::Api {
            action: "keep the cluster's keys for another control plane",
            source: Box::new(error),
        };
        // What an earlier token offers cannot be opened by this one's key.
        match api.delete(NAME, &Default::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => drop(other.map_err(failed)?),
        }
        api.create(&PostParams::default(), &secret)
            .await
            .map_err(failed)?;
        Ok(key)
    }

    /// Reads what is shared.
    ///
    /// # Errors
    /// When it is gone, or another key has sealed it.
    pub async fn fetch(client: Client, key: &SealingKey) -> Result<Self, ShareError> {
        let api: Api<Secret> = Api::namespaced(client, NAMESPACE);
        let secret = match api.get(NAME).await {
            Ok(secret) => secret,
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {
                return Err(ShareError::Gone);
            }
            Err(source) => {
                return Err(ShareError::Api {
                    action: "read the cluster's keys",
                    source: Box::new(source),
                });
            }
        };
        let sealed = secret.data.and_then(|mut data| data.remove(FIELD));
        let text = key.open(&sealed.unwrap_or_default().0)?;
        serde_json::from_slice(&text).map_err(|_| ShareError::Open)
    }
}

/// Puts another store in the place of the one that a control plane's description has.
pub fn change_store(spec: &mut NodeSpec, flags: &[String]) -> Result<(), ShareError> {
    let mut services = spec.services.iter_mut();
    let service = services.find(|service| service.name == "controlplane");
    let service = service.ok_or(ShareError::NoControlPlane)?;
    let mut kept = Vec::new();
    let mut words = service.argv.drain(..);
    while let Some(word) = words.next() {
        if is_store_flag(&word) {
            drop(words.next());
        } else {
            kept.push(word);
        }
    }
    drop(words);
    kept.extend(flags.iter().cloned());
    service.argv = kept;
    Ok(())
}

/// Where the flags say that etcd is.
pub fn urls(flags: &[String]) -> Vec<String> {
    let urls = flags.iter().find_map(|word| word.strip_prefix("etcd:"));
    let urls = urls.unwrap_or_default().split(',');
    urls.map(str::to_owned).collect()
}

/// Where the state is, in one word, for those that would join.
pub fn kind_of_store(flags: &[String]) -> &'static str {
    if flags.iter().any(|flag| flag == EMBEDDED) {
        "embedded"
    } else {
        "etcd"
    }
}

/// Writes a file that only its owner may read.
pub(super) fn write(path: &Path, text: &str) -> Result<(), super::MachineError> {
    crate::up::specs::write_private(path, text)
        .map_err(|error| super::MachineError::Refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_only() {
        let (key, other) = (
            SealingKey::new().expect("a key"),
            SealingKey::new().expect("a key"),
        );
        let sealed = key.seal(b"secret").expect("sealed");
        assert_eq!(key.open(&sealed).expect("opened"), b"secret");
        assert!(other.open(&sealed).is_err());
        assert!(key.open(&sealed[..sealed.len() - 1]).is_err() && key.open(b"").is_err());
        assert!(key.to_string().parse::<SealingKey>().expect("a key") == key);
        for bad in ["", "zz", &"g".repeat(64), &"a".repeat(63)] {
            assert!(bad.parse::<SealingKey>().is_err());
        }
        let told = SealingKey::read(&key.to_string());
        assert!(matches!(told, Err(ShareError::Told)));
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), format!("{key}\n")).expect("written");
        let path = file.path().display().to_string();
        assert!(SealingKey::read(&path).expect("a key") == key);
    }
}
