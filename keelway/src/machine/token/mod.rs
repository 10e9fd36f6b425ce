//! Bootstrap tokens (`keelway token`): what a machine joins with.

pub mod command;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ListParams, ObjectMeta, PostParams};
use kube::{Api, Client};
use ring::rand::{SecureRandom, SystemRandom};

const NAMESPACE: &str = "kube-system";
const TYPE: &str = "bootstrap.kubernetes.io/token";
const NAME_PREFIX: &str = "bootstrap-token-";
/// What joining machines are in beside `system:bootstrappers`, and what docs/join.md's roles are bound to.
pub const GROUP: &str = "system:bootstrappers:keelway:join";
const ID_CHARS: usize = 6;
const SECRET_CHARS: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(
        "{0:?} is no token: one is like abcdef.0123456789abcdef, of lower-case letters and digits"
    )]
    Malformed(String),
    #[error("this machine has no randomness")]
    Random,
    #[error("cannot {action}: {source}")]
    Api {
        action: String,
        source: Box<kube::Error>,
    },
}

fn failed(action: impl Into<String>) -> impl FnOnce(kube::Error) -> TokenError {
    let action = action.into();
    move |source| TokenError::Api {
        action,
        source: Box::new(source),
    }
}

/// What machines are in that join as control planes.
pub const CONTROL_PLANE_GROUP: &str = "system:bootstrappers:keelway:control-plane";

/// A bootstrap token, `id.secret`. Shown by its id only, unless it is asked for.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.id)
    }
}

impl std::str::FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let word = |text: &str, chars: usize| {
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            text.len() == chars && text.chars().all(allowed)
        };
        // The text may be a secret with a slip in it, so only its beginning is said.
        let malformed = || TokenError::Malformed(text.chars().take(3).collect::<String>() + "...");
        let (id, secret) = text.split_once('.').ok_or_else(malformed)?;
        if !word(id, ID_CHARS) || !word(secret, SECRET_CHARS) {
            return Err(malformed());
        }
        Ok(Token {
            id: id.to_owned(),
            secret: secret.to_owned(),
        })
    }
}

impl Token {
    /// A new one, that nobody can guess.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn new() -> Result<Self, TokenError> {
        let random = SystemRandom::new();
        Ok(Token {
            id: word(&random, ID_CHARS)?,
            secret: word(&random, SECRET_CHARS)?,
        })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// As it is given to `keelway join`.
    pub fn shown(&self) -> String {
        format!("{}.{}", self.id, self.secret)
    }

    /// The Secret that makes the cluster know it, for `life`; without one, for ever.
    pub fn kept(
        &self,
        life: Option<Duration>,
        (description, groups): (&str, &[&str]),
        now: Timestamp,
    ) -> Secret {
        let mut fields = BTreeMap::from([
            ("token-id", self.id.clone()),
            ("token-secret", self.secret.clone()),
            ("usage-bootstrap-authentication", "true".to_owned()),
            ("usage-bootstrap-signing", "true".to_owned()),
            ("auth-extra-groups", groups.join(",")),
        ]);
        if let Some(life) = life {
            let at = now.as_second().saturating_add_unsigned(life.as_secs());
            let at = Timestamp::from_second(at).unwrap_or(Timestamp::MAX);
            fields.insert("expiration", at.to_string());
        }
        if !description.is_empty() {
            fields.insert("description", description.to_owned());
        }
        let bytes = |text: String| ByteString(text.into_bytes());
        let data = fields.into_iter().map(|(k, v)| (k.to_owned(), bytes(v)));
        Secret {
            metadata: ObjectMeta {
                name: Some(format!("{NAME_PREFIX}{}", self.id)),
                namespace: Some(NAMESPACE.to_owned()),
                ..Default::default()
            },
            type_: Some(TYPE.to_owned()),
            data: Some(data.collect()),
            ..Default::default()
        }
    }
}

/// Letters of base 36, each as likely as any other.
fn word(random: &SystemRandom, chars: usize) -> Result<String, TokenError> {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // The largest multiple of 36 in a byte: bytes above it would favour some letters.
    const FAIR: u8 = 252;
    let mut out = String::with_capacity(chars);
    let mut bytes = [0_u8; 64];
    while out.len() < chars {
        random.fill(&mut bytes).map_err(|_| TokenError::Random)?;
        let fair = bytes.iter().filter(|byte| **byte < FAIR);
        let letters = fair.map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]));
        out.extend(letters.take(chars - out.len()));
    }
    Ok(out)
}

/// A token as `keelway token list` shows it: what it is called, not what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub id: String,
    /// None: for ever.
    pub expires: Option<String>,
    pub description: String,
}

fn secrets(client: Client) -> Api<Secret> {
    Api::namespaced(client, NAMESPACE)
}

/// Makes the cluster know a token.
///
/// # Errors
/// What the API server says.
pub async fn create(
    client: Client,
    token: &Token,
    life: Option<Duration>,
    (description, groups): (&str, &[&str]),
) -> Result<Secret, TokenError> {
    let secret = token.kept(life, (description, groups), Timestamp::now());
    let (api, params) = (secrets(client), PostParams::default());
    let made = api.create(&params, &secret).await;
    made.map_err(failed(format!("create the token {}", token.id)))
}

/// The tokens that there are.
///
/// # Errors
/// What the API server says.
pub async fn list(client: Client) -> Result<Vec<Listed>, TokenError> {
    let params = ListParams::default().fields(&format!("type={TYPE}"));
    let found = secrets(client).list(&params).await;
    let found = found.map_err(failed("list tokens"))?;
    let listed = |secret: &Secret| {
        let text = |name: &str| {
            let value = secret.data.as_ref()?.get(name)?;
            String::from_utf8(value.0.clone()).ok()
        };
        Listed {
            id: text("token-id").unwrap_or_default(),
            expires: text("expiration"),
            description: text("description").unwrap_or_default(),
        }
    };
    Ok(found.items.iter().map(listed).collect())
}

/// Makes a token good for nothing. `named` is its id, or the whole token.
///
/// # Errors
/// When there is none of that id.
pub async fn delete(client: Client, named: &str) -> Result<String, TokenError> {
    let id = named.split('.').next().unwrap_or(named).to_owned();
    let name = format!("{NAME_PREFIX}{id}");
    let gone = secrets(client).delete(&name, &Default::default()).await;
    gone.map_err(failed(format!("delete the token {id}")))?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_tokens_have_the_form_of_one_and_differ() {
        let (one, other) = (Token::new().expect("made"), Token::new().expect("made"));
        assert_eq!(one.shown().parse::<Token>().expect("a token"), one);
        assert_ne!(one, other);
        assert!(!format!("{one:?}").contains(one.secret()));
    }

    #[test]
    fn what_is_no_token_is_refused_without_being_told() {
        for text in [
            "",
            "abcdef",
            "abcdef.zyxwvutsrqponmlK",
            "abc.zyxwvutsrqponmlk",
        ] {
            let error = text.parse::<Token>().expect_err("none").to_string();
            assert!(!error.contains("zyxw"), "{error}");
        }
    }

    #[test]
    fn a_token_expires_when_its_life_is_over() {
        let token: Token = "abcdef.0123456789abcdef".parse().expect("a token");
        let now = "2026-01-01T00:00:00Z".parse().expect("a time");
        let kept = token.kept(Some(Duration::from_secs(3600)), ("for one", &[GROUP]), now);
        let data = kept.data.expect("data");
        let text = |name: &str| String::from_utf8(data[name].0.clone()).expect("text");
        assert_eq!(text("expiration"), "2026-01-01T01:00:00Z");
        assert_eq!(text("auth-extra-groups"), GROUP);
        let forever = token.kept(None, ("", &[GROUP]), now).data.expect("data");
        assert!(!forever.contains_key("expiration"));
    }
}
