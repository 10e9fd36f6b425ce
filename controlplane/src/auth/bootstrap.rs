//! Bootstrap tokens: what a machine that joins a cluster shows until it has a certificate. Each is a Secret of kube-system of type
//! `bootstrap.kubernetes.io/token`; the rules are Kubernetes' own (cluster-bootstrap/token/api).

use super::{AUTHENTICATED, AuthError, Identity};

/// The type of the Secrets.
pub const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";
/// The namespace that they are looked for in.
pub const NAMESPACE: &str = "kube-system";
/// What their names begin with; the rest is the token's id.
pub const NAME_PREFIX: &str = "bootstrap-token-";
/// The group of all who show one.
pub const GROUP: &str = "system:bootstrappers";
const USER_PREFIX: &str = "system:bootstrap:";
const ID_CHARS: usize = 6;
const SECRET_CHARS: usize = 16;
const GROUP_CHARS_MAX: usize = 256;

/// A token as it is shown: `id.secret`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shown<'a> {
    pub id: &'a str,
    secret: &'a str,
}

impl<'a> Shown<'a> {
    /// None when the text has not the form of a bootstrap token.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (id, secret) = text.split_once('.')?;
        (is_word(id, ID_CHARS) && is_word(secret, SECRET_CHARS)).then_some(Self { id, secret })
    }

    /// The name of its Secret.
    pub fn secret_name(&self) -> String {
        format!("{NAME_PREFIX}{}", self.id)
    }
}

fn is_word(text: &str, chars: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() == chars && text.bytes().all(allowed)
}

/// A token as its Secret keeps it.
pub struct Kept {
    pub id: String,
    secret: String,
    /// Seconds since 1970; None when it does not expire.
    pub expires_s: Option<i64>,
    authenticates: bool,
    signs: bool,
    groups: Vec<String>,
}

fn refused(reason: &str) -> AuthError {
    AuthError::Token(reason.to_owned())
}

impl Kept {
    /// Reads a Secret: its name, and `field` for its data.
    ///
    /// # Errors
    /// When it is not a bootstrap token's.
    pub fn read(name: &str, field: impl Fn(&str) -> Option<String>) -> Result<Self, AuthError> {
        let text = |key: &str| field(key).unwrap_or_default();
        let (id, secret) = (text("token-id"), text("token-secret"));
        if !is_word(&id, ID_CHARS) || !is_word(&secret, SECRET_CHARS) {
            return Err(refused("is kept in a Secret that has no id and secret"));
        }
        if name.strip_prefix(NAME_PREFIX) != Some(&id) {
            return Err(refused(
                "is kept in a Secret that is not named after its id",
            ));
        }
        // A time that cannot be read is one that has passed.
        let expires_s = field("expiration").map(|at| {
            let at = at.parse::<jiff::Timestamp>();
            at.map_or(i64::MIN, jiff::Timestamp::as_second)
        });
        let extra = text("auth-extra-groups");
        let extra = extra.split(',').map(str::trim).filter(|g| !g.is_empty());
        Ok(Self {
            id,
            secret,
            expires_s,
            authenticates: text("usage-bootstrap-authentication") == "true",
            signs: text("usage-bootstrap-signing") == "true",
            groups: extra.map(str::to_owned).collect(),
        })
    }

    pub fn has_expired(&self, now_s: i64) -> bool {
        self.expires_s.is_some_and(|at| at <= now_s)
    }

    /// The secret, when it may sign what joining machines read.
    pub fn signing_key(&self, now_s: i64) -> Option<&[u8]> {
        (self.signs && !self.has_expired(now_s)).then_some(self.secret.as_bytes())
    }

    /// Who shows the token.
    ///
    /// # Errors
    /// When it is another one, has expired, or is not for this.
    pub fn identity(&self, shown: &Shown<'_>, now_s: i64) -> Result<Identity, AuthError> {
        // Digests, so that how long the comparison takes tells nothing of the secret.
        let digest = |text: &str| ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        let same = digest(&self.secret).as_ref() == digest(shown.secret).as_ref();
        if !same || self.id != shown.id {
            return Err(refused("has another secret"));
        }
        if self.has_expired(now_s) {
            return Err(refused("has expired"));
        }
        if !self.authenticates {
            return Err(refused("is not for authentication"));
        }
        if let Some(group) = self.groups.iter().find(|group| !is_group(group)) {
            let reason = format!("has the group {group:?}, which is not below {GROUP}:");
            return Err(AuthError::Token(reason));
        }
        let mut groups = vec![GROUP.to_owned()];
        groups.extend(self.groups.iter().cloned());
        groups.push(AUTHENTICATED.to_owned());
        Ok(Identity {
            user: format!("{USER_PREFIX}{}", self.id),
            groups,
            ..Identity::default()
        })
    }
}

/// Whether a token may be in the group: `system:bootstrappers:` and a name.
fn is_group(group: &str) -> bool {
    let Some(name) = group
        .strip_prefix(GROUP)
        .and_then(|rest| rest.strip_prefix(':'))
    else {
        return false;
    };
    let ends = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let inner = |byte: u8| ends(byte) || byte == b':' || byte == b'-';
    name.len() <= GROUP_CHARS_MAX
        && name.bytes().all(inner)
        && name.bytes().last().is_some_and(ends)
}

/// A detached JSON Web Signature (RFC 7515, appendix F) of `content` by a token, as `cluster-info` has it for each.
pub fn sign(id: &str, key: &[u8], content: &str) -> String {
    use super::token::base64_url;
    let header = base64_url(format!(r#"{{"alg":"HS256","kid":"{id}"}}"#).as_bytes());
    let signed = format!("{header}.{}", base64_url(content.as_bytes()));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
    let signature = ring::hmac::sign(&key, signed.as_bytes());
    format!("{header}..{}", base64_url(signature.as_ref()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn kept(changes: &[(&str, &str)]) -> Result<Kept, AuthError> {
        let mut fields = BTreeMap::from([
            ("token-id", "abcdef"),
            ("token-secret", "0123456789abcdef"),
            ("expiration", "2026-01-02T00:00:00Z"),
            ("usage-bootstrap-authentication", "true"),
            ("usage-bootstrap-signing", "true"),
            ("auth-extra-groups", "system:bootstrappers:a:b"),
        ]);
        fields.extend(changes.iter().copied());
        Kept::read("bootstrap-token-abcdef", |name| {
            fields.get(name).map(|value| (*value).to_owned())
        })
    }

    fn at(time: &str) -> i64 {
        time.parse::<jiff::Timestamp>().unwrap().as_second()
    }

    #[test]
    fn a_token_names_its_user_and_groups() {
        let shown = Shown::parse("abcdef.0123456789abcdef").unwrap();
        let identity = kept(&[])
            .unwrap()
            .identity(&shown, at("2026-01-01T00:00:00Z"))
            .unwrap();
        assert_eq!(identity.user, "system:bootstrap:abcdef");
        assert_eq!(
            identity.groups,
            [
                "system:bootstrappers",
                "system:bootstrappers:a:b",
                "system:authenticated"
            ]
        );
    }

    #[test]
    fn only_the_form_of_a_token_is_taken_for_one() {
        for text in [
            "abcdef.0123456789ABCDEF",
            "abcdef.0123456789abcde",
            "abcdeg0123456789abcdef",
            "a.b.c",
            "",
            "ab-def.0123456789abcdef",
        ] {
            assert!(Shown::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_token_that_is_wrong_expired_or_for_something_else_is_refused() {
        let now = at("2026-01-01T00:00:00Z");
        let good = Shown::parse("abcdef.0123456789abcdef").unwrap();
        let refusal = |changes: &[(&str, &str)], shown: &str, now: i64| {
            let shown = Shown::parse(shown).unwrap();
            let found = kept(changes).and_then(|kept| kept.identity(&shown, now));
            found.map(|identity| identity.user).unwrap_err().to_string()
        };
        let text = "abcdef.0123456789abcdef";
        for (changes, shown, now, wanted) in [
            (&[][..], "abcdef.0123456789abcdeg", now, "another secret"),
            (&[], "abcdeg.0123456789abcdef", now, "another secret"),
            (&[], text, at("2026-01-02T00:00:00Z"), "expired"),
            (&[("expiration", "tomorrow")], text, now, "expired"),
            (
                &[("usage-bootstrap-authentication", "false")],
                text,
                now,
                "not for authentication",
            ),
            (
                &[("auth-extra-groups", "system:masters")],
                text,
                now,
                "not below",
            ),
            (
                &[(
                    "auth-extra-groups",
                    "system:bootstrappers:a,system:bootstrappers:",
                )],
                text,
                now,
                "not below",
            ),
            (&[("token-id", "fedcba")], text, now, "not named after"),
            (&[("token-secret", "")], text, now, "no id and secret"),
        ] {
            let found = refusal(changes, shown, now);
            assert!(found.contains(wanted), "{changes:?} {shown}: {found}");
        }
        assert!(kept(&[]).unwrap().identity(&good, now).is_ok());
    }

    #[test]
    fn a_signature_is_a_detached_one_over_the_content() {
        let kept = kept(&[]).unwrap();
        let key = kept.signing_key(at("2026-01-01T00:00:00Z")).unwrap();
        let signature = sign("abcdef", key, "content");
        // By an independent implementation: python3's hmac over the same header and content.
        assert_eq!(
            signature,
            "eyJhbGciOiJIUzI1NiIsImtpZCI6ImFiY2RlZiJ9..psz1NayrXM3IaFzKZGsb5n_mBl7MjtlsZ1xE8MRmF_4"
        );
        assert!(kept.signing_key(at("2026-01-03T00:00:00Z")).is_none());
        assert_ne!(signature, sign("abcdef", key, "other"));
    }
}
