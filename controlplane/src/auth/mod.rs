//! Who a caller is: client certificates and ServiceAccount tokens. All pure; what needs the store (does the pod still
//! exist?) is left to the caller, who gets the claims.

use std::collections::BTreeMap;

use serde_json::Value;

/// Identity is an authenticated caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub user: String,
    /// `system:authenticated` included.
    pub groups: Vec<String>,
    pub uid: String,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Identity {
    /// From a client certificate that the TLS layer has verified: CN is the user, O the groups.
    pub fn from_certificate(der: &[u8]) -> Result<Self, AuthError> {
        todo!("{}", der.len())
    }
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
    /// `UserInfo` of authentication.k8s.io/v1 (SelfSubjectReview, TokenReview).
    pub fn user_info(&self) -> Value {
        todo!()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    #[error("the client certificate {0}")]
    Certificate(String),
    #[error("the key {0}")]
    Key(String),
    /// 401.
    #[error("the token {0}")]
    Token(String),
    /// 422: a TokenRequest that cannot be granted, with the field.
    #[error("{field}: {reason}")]
    Request { field: &'static str, reason: String },
}

/// ObjectRef is an object that a token names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectRef {
    pub name: String,
    pub uid: String,
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

impl TokenSpec {
    /// `system:serviceaccount:<namespace>:<name>` with its groups and extras.
    pub fn identity(&self) -> Identity {
        todo!()
    }
}

/// TokenKeys signs and verifies ServiceAccount tokens. Keys are PEM: ECDSA P-256 (ES256, what `keelway up` makes) or
/// RSA (RS256); the kind is read from the file.
pub struct TokenKeys {
    issuer: String,
}

impl TokenKeys {
    /// `private` is PKCS8 (or SEC1/PKCS1) PEM, `public` SPKI PEM.
    pub fn from_pem(private: &[u8], public: &[u8], issuer: &str) -> Result<Self, AuthError> {
        todo!("{} {} {issuer}", private.len(), public.len())
    }
    pub fn sign(&self, spec: &TokenSpec) -> Result<String, AuthError> {
        todo!("{spec:?} {}", self.issuer)
    }
    /// Checks signature, issuer, times and that one of `audiences` is in the token.
    pub fn verify(
        &self,
        token: &str,
        audiences: &[&str],
        now: i64,
    ) -> Result<TokenSpec, AuthError> {
        todo!("{token} {audiences:?} {now}")
    }
    /// Grants a TokenRequest: `request` is the body, `account` the ServiceAccount, `bound` the object that
    /// `spec.boundObjectRef` names (the caller looks it up). Returns the TokenRequest with its status.
    pub fn grant(
        &self,
        request: &Value,
        account: &Value,
        bound: Option<&Value>,
        now: i64,
    ) -> Result<Value, AuthError> {
        todo!("{request} {account} {bound:?} {now}")
    }
}
