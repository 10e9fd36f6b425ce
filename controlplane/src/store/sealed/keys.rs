//! The keys that values are sealed with, from a file in the form of Kubernetes (EncryptionConfiguration of
//! apiserver.config.k8s.io/v1): AES-GCM with keys of 16 or 32 bytes, or nothing (`identity`).

use std::path::Path;

use base64::Engine;
use bytes::Bytes;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Deserialize;

/// How a sealed value begins, before the name of its key: as upstream, so that either reads what the other wrote.
const SEAL: &str = "k8s:enc:aesgcm:v1:";
/// What anything sealed by anybody begins with.
const SEALED: &[u8] = b"k8s:enc:";

/// A KeysError says what of the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("cannot read the keys of {path}: {reason}")]
    Read { path: String, reason: String },
    #[error("{path}: {reason}")]
    Config { path: String, reason: String },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    resources: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    resources: Vec<String>,
    providers: Vec<Provider>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Provider {
    aesgcm: Option<KeyList>,
    identity: Option<Identity>,
    // Named by others' files; not here.
    aescbc: Option<serde_json::Value>,
    secretbox: Option<serde_json::Value>,
    kms: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct KeyList {
    keys: Vec<NamedKey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedKey {
    name: String,
    secret: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {}

/// One way to keep a value.
enum Way {
    Plain,
    Key {
        seal: Vec<u8>,
        key: Box<LessSafeKey>,
    },
}

/// Group is what is kept in the same ways: written in the first, read in all of them.
struct Group {
    prefixes: Vec<String>,
    ways: Vec<Way>,
}

/// Keys say how the value of each key of the store is kept.
pub struct Keys {
    groups: Vec<Group>,
    random: SystemRandom,
}

impl Keys {
    pub fn read(path: &Path) -> Result<Self, KeysError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| KeysError::Read {
            path: name.clone(),
            reason: error.to_string(),
        })?;
        Self::parse(&text).map_err(|reason| KeysError::Config { path: name, reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        // The words of a parser may quote the line that it stumbled on, and that may be a key.
        let file: File = serde_saphyr::from_str(text)
            .map_err(|_| "is no EncryptionConfiguration of resources and providers".to_owned())?;
        if file.kind != "EncryptionConfiguration"
            || file.api_version != "apiserver.config.k8s.io/v1"
        {
            return Err(format!(
                "holds {} of {}, not EncryptionConfiguration of apiserver.config.k8s.io/v1",
                file.kind, file.api_version
            ));
        }
        let groups: Result<Vec<Group>, String> = file.resources.into_iter().map(group).collect();
        Ok(Self {
            groups: groups?,
            random: SystemRandom::new(),
        })
    }

    fn ways(&self, key: &str) -> Option<&[Way]> {
        let kept = |group: &&Group| group.prefixes.iter().any(|p| key.starts_with(p.as_str()));
        self.groups.iter().find(kept).map(|group| &*group.ways)
    }

    /// Whether values below a prefix may be sealed.
    pub fn covers(&self, prefix: &str) -> bool {
        let mut prefixes = self.groups.iter().flat_map(|group| &group.prefixes);
        prefixes.any(|kept| prefix.starts_with(kept.as_str()) || kept.starts_with(prefix))
    }

    /// What is covered.
    pub fn prefixes(&self) -> impl Iterator<Item = &str> {
        let groups = self.groups.iter();
        groups.flat_map(|group| group.prefixes.iter().map(String::as_str))
    }

    /// The value as it is kept.
    pub fn seal(&self, key: &str, value: Bytes) -> Result<Bytes, String> {
        let Some(Way::Key { seal, key: cipher }) = self.ways(key).and_then(<[Way]>::first) else {
            return Ok(value);
        };
        let mut nonce = [0; NONCE_LEN];
        self.random
            .fill(&mut nonce)
            .map_err(|_| "the system has no randomness".to_owned())?;
        let mut sealed = Vec::with_capacity(seal.len() + NONCE_LEN + value.len() + 16);
        sealed.extend_from_slice(seal);
        sealed.extend_from_slice(&nonce);
        let start = sealed.len();
        sealed.extend_from_slice(&value);
        // Bound to its key: a value that is put in another one's place does not open.
        let tag = cipher
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(key.as_bytes()),
                &mut sealed[start..],
            )
            .map_err(|_| "it cannot be sealed".to_owned())?;
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed.into())
    }

    /// The value that was sealed.
    pub fn open(&self, key: &str, kept: &Bytes) -> Result<Bytes, String> {
        let Some(ways) = self.ways(key) else {
            return match kept.starts_with(SEALED) {
                true => Err("it is sealed, and no provider is named for it".to_owned()),
                false => Ok(kept.clone()),
            };
        };
        for way in ways {
            match way {
                Way::Plain if !kept.starts_with(SEALED) => return Ok(kept.clone()),
                Way::Key { seal, key: cipher } if kept.starts_with(seal) => {
                    return unseal(cipher, key, &kept[seal.len()..])
                        .ok_or_else(|| "its seal is broken, or of another key".to_owned());
                }
                _ => {}
            }
        }
        Err(match kept.starts_with(SEALED) {
            true => "it is sealed with a key that is not in the file".to_owned(),
            false => "it is not sealed, and `identity` is not among the providers".to_owned(),
        })
    }

    /// Whether a value is kept in the way that it would be written in now.
    pub fn is_current(&self, key: &str, kept: &[u8]) -> bool {
        match self.ways(key).and_then(<[Way]>::first) {
            Some(Way::Key { seal, .. }) => kept.starts_with(seal),
            Some(Way::Plain) => !kept.starts_with(SEALED),
            None => true,
        }
    }
}

fn unseal(cipher: &LessSafeKey, key: &str, sealed: &[u8]) -> Option<Bytes> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
    let mut sealed = sealed.to_vec();
    let nonce = Nonce::assume_unique_for_key(*nonce);
    let opened = cipher.open_in_place(nonce, Aad::from(key.as_bytes()), &mut sealed);
    let length = opened.ok()?.len();
    sealed.truncate(length);
    Some(sealed.into())
}

fn group(rule: Rule) -> Result<Group, String> {
    let mut ways = Vec::new();
    for provider in rule.providers {
        if let Some(list) = provider.aesgcm {
            for key in list.keys {
                ways.push(way(&key)?);
            }
        } else if provider.identity.is_some() {
            ways.push(Way::Plain);
        } else {
            let other = [
                ("aescbc", provider.aescbc.is_some()),
                ("secretbox", provider.secretbox.is_some()),
                ("kms", provider.kms.is_some()),
            ];
            let other = other.iter().find(|(_, named)| *named);
            let (name, _) = other.ok_or("has a provider without a name")?;
            return Err(format!(
                "names the provider {name}; there are aesgcm and identity"
            ));
        }
    }
    if ways.is_empty() {
        return Err("has resources without a provider".to_owned());
    }
    let prefixes: Result<Vec<String>, String> = rule.resources.iter().map(|r| prefix(r)).collect();
    Ok(Group {
        prefixes: prefixes?,
        ways,
    })
}

/// The place of a resource: `secrets`, `deployments.apps`, or everything (`*.*`).
fn prefix(resource: &str) -> Result<String, String> {
    let (plural, group) = resource.split_once('.').unwrap_or((resource, ""));
    match (plural, group) {
        ("*", "*") => Ok("/".to_owned()),
        ("", _) => Err("has a resource without a name".to_owned()),
        (plural, _) if plural.contains('*') => Err(format!(
            "names {resource:?}; name each resource, or all by *.*"
        )),
        (plural, "") => Ok(format!("/core/{plural}/")),
        (plural, group) => Ok(format!("/{group}/{plural}/")),
    }
}

fn way(key: &NamedKey) -> Result<Way, String> {
    let bad = |why: &str| format!("has a key {:?} that {why}", key.name);
    if key.name.is_empty() || key.name.contains(':') {
        return Err(bad("needs another name: not empty, and without a colon"));
    }
    let secret = base64::engine::general_purpose::STANDARD
        .decode(key.secret.trim())
        .map_err(|_| bad("is not in base64"))?;
    let algorithm = match secret.len() {
        16 => &AES_128_GCM,
        32 => &AES_256_GCM,
        _ => return Err(bad("has neither 16 nor 32 bytes")),
    };
    let cipher = UnboundKey::new(algorithm, &secret).map_err(|_| bad("cannot be used"))?;
    Ok(Way::Key {
        seal: format!("{SEAL}{}:", key.name).into_bytes(),
        key: Box::new(LessSafeKey::new(cipher)),
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const ONE: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const TWO: &str = "Dw4NDAsKCQgHBgUEAwIBAA==";

    /// A configuration of secrets with providers, first to last: `one`, `two` or `identity`.
    pub fn configuration(providers: &[&str]) -> String {
        let providers: String = providers
            .iter()
            .map(|provider| match *provider {
                "identity" => "\n  - identity: {}".to_owned(),
                name => {
                    let secret = if name == "one" { ONE } else { TWO };
                    format!("\n  - aesgcm: {{keys: [{{name: {name}, secret: {secret}}}]}}")
                }
            })
            .collect();
        format!(
            "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n\
             - resources: [secrets]\n  providers:{providers}\n"
        )
    }

    impl Keys {
        /// That seal everything.
        pub fn everything() -> Self {
            Self::parse(&configuration(&["one"]).replace("[secrets]", "['*.*']")).expect("keys")
        }
    }

    pub fn keys(providers: &[&str]) -> Keys {
        Keys::parse(&configuration(providers)).expect("keys")
    }

    const KEY: &str = "/core/secrets/a/b";

    #[test]
    fn a_value_opens_with_its_key_in_its_place_and_nowhere_else() {
        let (one, value) = (keys(&["one"]), Bytes::from_static(b"{\"metadata\":{}}"));
        let sealed = one.seal(KEY, value.clone()).unwrap();
        assert!(sealed.starts_with(b"k8s:enc:aesgcm:v1:one:"));
        assert!(!sealed.windows(8).any(|part| part == b"metadata"));
        assert_ne!(sealed, one.seal(KEY, value.clone()).unwrap());
        assert_eq!(one.open(KEY, &sealed), Ok(value.clone()));
        assert!(one.open("/core/secrets/a/c", &sealed).is_err());
        for at in [sealed.len() - 1, sealed.len() - 20, 25] {
            let mut bent = sealed.to_vec();
            bent[at] ^= 1;
            assert!(one.open(KEY, &bent.into()).is_err(), "{at}");
        }
        assert!(one.open(KEY, &sealed.slice(..24)).is_err());
        assert!(keys(&["two"]).open(KEY, &sealed).is_err());
        assert!(keys(&["identity"]).open(KEY, &sealed).is_err());
        assert_eq!(keys(&["two", "one"]).open(KEY, &sealed), Ok(value.clone()));
        // What is not a Secret stays as it is.
        let pod = "/core/pods/a/b";
        assert_eq!(one.seal(pod, value.clone()).unwrap(), value);
        assert_eq!(one.open(pod, &value), Ok(value.clone()));
        assert!(one.open(pod, &sealed).is_err());
        assert!(one.open(KEY, &value).is_err(), "identity is not named");
        assert_eq!(keys(&["one", "identity"]).open(KEY, &value), Ok(value));
    }

    #[test]
    fn what_the_file_gets_wrong_is_told_without_its_secrets() {
        let good = configuration(&["one", "identity"]);
        for (from, to, expected) in [
            (ONE, "AAEC", "neither 16 nor 32 bytes"),
            (ONE, "?", "not in base64"),
            ("aesgcm", "aescbc", "there are aesgcm and identity"),
            ("kind: Enc", "kind: Dec", "not EncryptionConfiguration"),
            ("name: one", "name: 'o:e'", "without a colon"),
            ("[secrets]", "['*.apps']", "name each resource"),
            ("providers:", "provider:", "is no EncryptionConfiguration"),
        ] {
            let error = Keys::parse(&good.replace(from, to)).err().expect(expected);
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains(ONE), "{error}");
        }
        assert!(Keys::parse("").is_err());
    }
}
