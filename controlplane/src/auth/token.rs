//! ServiceAccount tokens: JWTs with Kubernetes' claims, and how a TokenRequest is granted.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::identity::{AUTHENTICATED, CREDENTIAL_ID};
use super::{AuthError, Identity, TokenKeys};
use crate::codec::time;

/// Lifetime when a request names none.
const EXPIRATION_SECONDS_DEFAULT: i64 = 3600;
const EXPIRATION_SECONDS_MIN: i64 = 600;
const EXPIRATION_SECONDS_MAX: i64 = 1 << 32;
/// How far the clock of another control plane may be ahead.
const SKEW_SECONDS_MAX: i64 = 10;
/// Longer texts are not tokens of ours.
const TOKEN_BYTES_MAX: usize = 16 << 10;

pub(super) fn base64_url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// ObjectRef is an object that a token names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRef {
    pub name: String,
    #[serde(default)]
    pub uid: String,
}

impl ObjectRef {
    fn of(object: &Value) -> Self {
        let text = |key: &str| {
            object["metadata"][key]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        Self {
            name: text("name"),
            uid: text("uid"),
        }
    }
}

/// TokenSpec is what a ServiceAccount token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSpec {
    pub namespace: String,
    pub service_account: ObjectRef,
    /// The pod the token is bound to, and its node when known.
    pub pod: Option<ObjectRef>,
    pub node: Option<ObjectRef>,
    pub secret: Option<ObjectRef>,
    pub audiences: Vec<String>,
    /// Seconds since the epoch.
    pub issued_at: i64,
    pub expires_at: i64,
    /// The token's id.
    pub jti: String,
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    aud: Vec<String>,
    exp: i64,
    iat: i64,
    iss: String,
    #[serde(default)]
    jti: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: KubernetesClaims,
    #[serde(default)]
    nbf: i64,
    sub: String,
}

#[derive(Serialize, Deserialize)]
struct KubernetesClaims {
    namespace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<ObjectRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<ObjectRef>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<ObjectRef>,
    serviceaccount: ObjectRef,
}

impl TokenSpec {
    fn user(&self) -> String {
        format!(
            "system:serviceaccount:{}:{}",
            self.namespace, self.service_account.name
        )
    }

    /// `system:serviceaccount:<namespace>:<name>` with its groups and extras.
    pub fn identity(&self) -> Identity {
        let groups = vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{}", self.namespace),
            AUTHENTICATED.to_owned(),
        ];
        let mut extra = BTreeMap::new();
        let mut add = |key: &str, value: String| {
            if !value.is_empty() {
                extra.insert(key.to_owned(), vec![value]);
            }
        };
        if !self.jti.is_empty() {
            add(CREDENTIAL_ID, format!("JTI={}", self.jti));
        }
        for (kind, reference) in [("pod", &self.pod), ("node", &self.node)] {
            if let Some(reference) = reference {
                add(
                    &format!("authentication.kubernetes.io/{kind}-name"),
                    reference.name.clone(),
                );
                add(
                    &format!("authentication.kubernetes.io/{kind}-uid"),
                    reference.uid.clone(),
                );
            }
        }
        Identity {
            user: self.user(),
            groups,
            uid: self.service_account.uid.clone(),
            extra,
        }
    }
}

impl TokenKeys {
    /// Who issues the tokens; also their default audience.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    pub fn sign(&self, spec: &TokenSpec) -> Result<String, AuthError> {
        let (alg, kid) = self.header();
        let header = Header {
            alg: alg.to_owned(),
            kid: kid.to_owned(),
        };
        let claims = Claims {
            aud: spec.audiences.clone(),
            exp: spec.expires_at,
            iat: spec.issued_at,
            iss: self.issuer.clone(),
            jti: spec.jti.clone(),
            kubernetes: KubernetesClaims {
                namespace: spec.namespace.clone(),
                node: spec.node.clone(),
                pod: spec.pod.clone(),
                secret: spec.secret.clone(),
                serviceaccount: spec.service_account.clone(),
            },
            nbf: spec.issued_at,
            sub: spec.user(),
        };
        let part = |json: Result<Vec<u8>, serde_json::Error>| {
            json.map(|json| base64_url(&json))
                .map_err(|e| AuthError::Token(format!("cannot be encoded: {e}")))
        };
        let mut token = format!(
            "{}.{}",
            part(serde_json::to_vec(&header))?,
            part(serde_json::to_vec(&claims))?
        );
        let signature = base64_url(&self.sign_bytes(token.as_bytes())?);
        token.push('.');
        token.push_str(&signature);
        Ok(token)
    }

    /// Checks signature, issuer, times and that one of `audiences` is in the token. Whether the ServiceAccount and what
    /// the token is bound to still exist with these uids is for the caller to check.
    pub fn verify(
        &self,
        token: &str,
        audiences: &[&str],
        now: i64,
    ) -> Result<TokenSpec, AuthError> {
        let refuse = |why: &str| AuthError::Token(why.to_owned());
        if token.len() > TOKEN_BYTES_MAX {
            return Err(refuse("is too long"));
        }
        let mut parts = token.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(refuse("is not a JWT"));
        };
        let signed = &token[..header.len() + 1 + claims.len()];
        let decode = |part: &str| {
            URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| refuse("is not a JWT"))
        };
        let header: Header = serde_json::from_slice(&decode(header)?)
            .map_err(|_| refuse("has an unreadable header"))?;
        if !self.verify_bytes(
            &header.alg,
            &header.kid,
            signed.as_bytes(),
            &decode(signature)?,
        ) {
            return Err(refuse("has a signature that is not this cluster's"));
        }
        let claims: Claims = serde_json::from_slice(&decode(claims)?)
            .map_err(|_| refuse("has unreadable claims"))?;
        if claims.iss != self.issuer {
            return Err(refuse("is of another issuer"));
        }
        if now >= claims.exp {
            return Err(refuse("has expired"));
        }
        if claims.nbf > now + SKEW_SECONDS_MAX {
            return Err(refuse("is not valid yet"));
        }
        if !claims.aud.iter().any(|a| audiences.contains(&a.as_str())) {
            return Err(refuse("is for another audience"));
        }
        let spec = TokenSpec {
            namespace: claims.kubernetes.namespace,
            service_account: claims.kubernetes.serviceaccount,
            pod: claims.kubernetes.pod,
            node: claims.kubernetes.node,
            secret: claims.kubernetes.secret,
            audiences: claims.aud,
            issued_at: claims.iat,
            expires_at: claims.exp,
            jti: claims.jti,
        };
        if claims.sub != spec.user() {
            return Err(refuse("names two ServiceAccounts"));
        }
        Ok(spec)
    }

    /// Grants a TokenRequest: `request` is the body, `account` the ServiceAccount, `bound` the object that
    /// `spec.boundObjectRef` names, and `node` the one that a pod so named runs on (the caller looks both up). Returns the
    /// TokenRequest with its status.
    pub fn grant(
        &self,
        request: &Value,
        account: &Value,
        (bound, node): (Option<&Value>, Option<&Value>),
        now: i64,
    ) -> Result<Value, AuthError> {
        let refuse = |field, reason: &str| {
            Err(AuthError::Request {
                field,
                reason: reason.to_owned(),
            })
        };
        let spec = &request["spec"];
        let seconds = spec["expirationSeconds"]
            .as_i64()
            .unwrap_or(EXPIRATION_SECONDS_DEFAULT);
        if seconds < EXPIRATION_SECONDS_MIN {
            return refuse(
                "spec.expirationSeconds",
                "may not specify a duration less than 10 minutes",
            );
        }
        if seconds > EXPIRATION_SECONDS_MAX {
            return refuse(
                "spec.expirationSeconds",
                "may not specify a duration larger than 2^32 seconds",
            );
        }
        let asked = spec["audiences"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str);
        let mut audiences: Vec<String> =
            asked.filter(|a| !a.is_empty()).map(str::to_owned).collect();
        if audiences.is_empty() {
            audiences.push(self.issuer.clone());
        }
        let namespace = account["metadata"]["namespace"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let mut token = TokenSpec {
            namespace,
            service_account: ObjectRef::of(account),
            pod: None,
            node: None,
            secret: None,
            audiences,
            issued_at: now,
            expires_at: now + seconds,
            jti: uuid::Uuid::new_v4().to_string(),
        };
        let reference = &spec["boundObjectRef"];
        if reference.is_object() {
            bind(&mut token, reference, bound, node)?;
        }
        let expires =
            jiff::Timestamp::from_second(token.expires_at).map_err(|e| AuthError::Request {
                field: "spec.expirationSeconds",
                reason: e.to_string(),
            })?;
        let mut granted = request.clone();
        granted["spec"]["audiences"] = json!(token.audiences);
        granted["spec"]["expirationSeconds"] = seconds.into();
        granted["status"] = json!({"token": self.sign(&token)?, "expirationTimestamp": time::render_seconds(expires)});
        Ok(granted)
    }
}

fn bind(
    token: &mut TokenSpec,
    reference: &Value,
    bound: Option<&Value>,
    node: Option<&Value>,
) -> Result<(), AuthError> {
    let refuse = |field, reason: String| Err(AuthError::Request { field, reason });
    let text = |key: &str| reference[key].as_str().unwrap_or_default();
    let (kind, name) = (text("kind"), text("name"));
    let Some(bound) = bound else {
        return refuse(
            "spec.boundObjectRef",
            format!("{kind} {name:?} is not found"),
        );
    };
    let object = ObjectRef::of(bound);
    if !text("uid").is_empty() && text("uid") != object.uid {
        let reason = format!(
            "the UID in the bound object reference ({}) does not match the UID in record ({})",
            text("uid"),
            object.uid
        );
        return refuse("spec.boundObjectRef.uid", reason);
    }
    match kind {
        "Pod" => {
            let account = bound["spec"]["serviceAccountName"]
                .as_str()
                .unwrap_or_default();
            if account != token.service_account.name {
                let reason = format!(
                    "cannot bind token for serviceaccount {:?} to pod running with different serviceaccount name",
                    token.service_account.name
                );
                return refuse("spec.boundObjectRef", reason);
            }
            let name = bound["spec"]["nodeName"].as_str().filter(|n| !n.is_empty());
            token.node = name.map(|name| ObjectRef {
                name: name.to_owned(),
                uid: node.map(|node| ObjectRef::of(node).uid).unwrap_or_default(),
            });
            token.pod = Some(object);
        }
        "Secret" => token.secret = Some(object),
        "Node" => token.node = Some(object),
        other => {
            return refuse(
                "spec.boundObjectRef.kind",
                format!("cannot bind token to object of type {other:?}"),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
    const NOW: i64 = 1_800_000_000;

    fn pems() -> (String, String) {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        (pair.serialize_pem(), pair.public_key_pem())
    }

    fn keys() -> TokenKeys {
        let (private, public) = pems();
        TokenKeys::from_pem(private.as_bytes(), public.as_bytes(), ISSUER).unwrap()
    }

    fn account() -> Value {
        json!({"metadata": {"name": "default", "namespace": "shop", "uid": "sa-uid"}})
    }

    fn node() -> Value {
        json!({"metadata": {"name": "node-1", "uid": "node-uid"}})
    }

    fn pod() -> Value {
        json!({"metadata": {"name": "p", "uid": "pod-uid"}, "spec": {"serviceAccountName": "default", "nodeName": "node-1"}})
    }

    fn token(keys: &TokenKeys) -> String {
        let request = json!({"spec": {"expirationSeconds": 600, "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": "pod-uid"}}});
        let granted = keys
            .grant(&request, &account(), (Some(&pod()), Some(&node())), NOW)
            .unwrap();
        assert_eq!(
            granted["status"]["expirationTimestamp"],
            "2027-01-15T08:10:00Z"
        );
        assert_eq!(granted["spec"]["audiences"], json!([ISSUER]));
        granted["status"]["token"].as_str().unwrap().to_owned()
    }

    #[test]
    fn a_granted_token_verifies_and_names_account_pod_and_node() {
        let keys = keys();
        let spec = keys.verify(&token(&keys), &[ISSUER], NOW + 599).unwrap();
        assert_eq!(
            spec.pod,
            Some(ObjectRef {
                name: "p".into(),
                uid: "pod-uid".into()
            })
        );
        let identity = spec.identity();
        assert_eq!(
            (identity.user.as_str(), identity.uid.as_str()),
            ("system:serviceaccount:shop:default", "sa-uid")
        );
        assert_eq!(
            identity.groups,
            [
                "system:serviceaccounts",
                "system:serviceaccounts:shop",
                "system:authenticated"
            ]
        );
        assert_eq!(
            identity.extra["authentication.kubernetes.io/pod-name"],
            ["p"]
        );
        assert_eq!(
            identity.extra["authentication.kubernetes.io/node-name"],
            ["node-1"]
        );
    }

    #[test]
    fn rsa_keys_sign_rs256() {
        let private = include_bytes!("testdata/rsa.key");
        let keys =
            TokenKeys::from_pem(private, include_bytes!("testdata/rsa.pub"), ISSUER).unwrap();
        let token = token(&keys);
        let header: Value = serde_json::from_slice(
            &URL_SAFE_NO_PAD
                .decode(token.split('.').next().unwrap())
                .unwrap(),
        )
        .unwrap();
        assert_eq!(header["alg"], "RS256");
        assert!(keys.verify(&token, &[ISSUER], NOW).is_ok());
    }

    #[test]
    fn a_token_that_is_late_early_altered_foreign_or_for_others_is_refused() {
        let keys = keys();
        let token = token(&keys);
        let refusal = |keys: &TokenKeys, token: &str, audience: &str, now| {
            keys.verify(token, &[audience], now)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refusal(&keys, &token, ISSUER, NOW + 600),
            "the token has expired"
        );
        assert_eq!(
            refusal(&keys, &token, ISSUER, NOW - 60),
            "the token is not valid yet"
        );
        assert_eq!(
            refusal(&keys, &token, "vault", NOW),
            "the token is for another audience"
        );
        assert_eq!(
            refusal(&self::keys(), &token, ISSUER, NOW),
            "the token has a signature that is not this cluster's"
        );
        let parts: Vec<&str> = token.split('.').collect();
        let mut claims: Value =
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
        claims["sub"] = "system:serviceaccount:kube-system:admin".into();
        let forged = format!(
            "{}.{}.{}",
            parts[0],
            base64_url(claims.to_string().as_bytes()),
            parts[2]
        );
        assert_eq!(
            refusal(&keys, &forged, ISSUER, NOW),
            "the token has a signature that is not this cluster's"
        );
        let unsigned = format!("{}.{}.", base64_url(b"{\"alg\":\"none\"}"), parts[1]);
        assert_eq!(
            refusal(&keys, &unsigned, ISSUER, NOW),
            "the token has a signature that is not this cluster's"
        );
        for nonsense in ["", "a.b", "a.b.c.d", "..", "é.é.é"] {
            assert!(keys.verify(nonsense, &[ISSUER], NOW).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn requests_that_cannot_be_granted_name_the_field() {
        let keys = keys();
        let field = |spec: Value, bound: Option<&Value>| match keys.grant(
            &json!({"spec": spec}),
            &account(),
            (bound, None),
            NOW,
        ) {
            Err(AuthError::Request { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            field(json!({"expirationSeconds": 599}), None),
            "spec.expirationSeconds"
        );
        assert_eq!(
            field(json!({"expirationSeconds": 1_i64 << 33}), None),
            "spec.expirationSeconds"
        );
        assert_eq!(
            field(
                json!({"boundObjectRef": {"kind": "Pod", "name": "gone"}}),
                None
            ),
            "spec.boundObjectRef"
        );
        let reference = json!({"boundObjectRef": {"kind": "Pod", "name": "p", "uid": "older"}});
        assert_eq!(field(reference, Some(&pod())), "spec.boundObjectRef.uid");
        let mut other = pod();
        other["spec"]["serviceAccountName"] = "other".into();
        assert_eq!(
            field(
                json!({"boundObjectRef": {"kind": "Pod", "name": "p"}}),
                Some(&other)
            ),
            "spec.boundObjectRef"
        );
        assert_eq!(
            field(
                json!({"boundObjectRef": {"kind": "Service", "name": "p"}}),
                Some(&pod())
            ),
            "spec.boundObjectRef.kind"
        );
    }

    #[test]
    fn a_key_can_be_replaced_while_tokens_of_the_old_one_live() {
        let (old_private, old_public) = pems();
        let (new_private, new_public) = pems();
        let old =
            TokenKeys::from_pem(old_private.as_bytes(), old_public.as_bytes(), ISSUER).unwrap();
        let both = format!("{old_public}{new_public}");
        let new = TokenKeys::from_pem(new_private.as_bytes(), both.as_bytes(), ISSUER).unwrap();
        assert!(new.verify(&token(&old), &[ISSUER], NOW).is_ok());
        assert!(new.verify(&token(&new), &[ISSUER], NOW).is_ok());
        assert!(old.verify(&token(&new), &[ISSUER], NOW).is_err());
    }

    #[test]
    fn keys_that_do_not_belong_together_or_are_none_are_refused() {
        let ((private, _), (_, public)) = (pems(), pems());
        let error = TokenKeys::from_pem(private.as_bytes(), public.as_bytes(), ISSUER)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("do not belong together"), "{error}");
        assert!(TokenKeys::from_pem(b"", b"", ISSUER).is_err());
    }
}
