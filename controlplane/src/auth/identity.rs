//! Identities, and how a client certificate gives one.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

use super::AuthError;

/// The group of who may do all, whatever the roles are.
pub const MASTERS: &str = "system:masters";
/// Who a request is of that nobody has signed, and the group that such requests alone are in.
pub const ANONYMOUS: &str = "system:anonymous";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
pub const AUTHENTICATED: &str = "system:authenticated";
pub(super) const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

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
    /// Of a request that nobody has signed.
    pub fn anonymous() -> Self {
        Self {
            user: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            ..Self::default()
        }
    }

    /// From a client certificate that the TLS layer has verified: CN is the user, O the groups.
    pub fn from_certificate(der: &[u8]) -> Result<Self, AuthError> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|e| AuthError::Certificate(format!("cannot be parsed: {e}")))?;
        let subject = certificate.subject();
        let user = common_name_in(subject).unwrap_or_default();
        if user.is_empty() {
            return Err(AuthError::Certificate(
                "has no common name in its subject, which would be the user".to_owned(),
            ));
        }
        let mut groups: Vec<String> = subject.iter_organization().filter_map(text).collect();
        groups.push(AUTHENTICATED.to_owned());
        let digest = ring::digest::digest(&ring::digest::SHA256, der);
        let credential: String = digest.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        let extra = BTreeMap::from([(
            CREDENTIAL_ID.to_owned(),
            vec![format!("X509SHA256={credential}")],
        )]);
        Ok(Self {
            user,
            groups,
            uid: String::new(),
            extra,
        })
    }

    /// In the group of all callers, where others have said what it is.
    pub fn among_everybody(mut self) -> Self {
        let everybody = match self.user.as_str() {
            ANONYMOUS => UNAUTHENTICATED,
            _ => AUTHENTICATED,
        };
        if !self.in_group(everybody) && !self.in_group(UNAUTHENTICATED) {
            self.groups.push(everybody.to_owned());
        }
        self
    }

    /// Whether the caller may do everything, whatever the rules say.
    pub fn is_master(&self) -> bool {
        self.in_group(MASTERS)
    }

    /// Namespace and name of the ServiceAccount that the caller is.
    pub fn account(&self) -> Option<(&str, &str)> {
        let account = self.user.strip_prefix("system:serviceaccount:")?;
        account.split_once(':')
    }

    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// `UserInfo` of authentication.k8s.io/v1 (SelfSubjectReview, TokenReview).
    pub fn user_info(&self) -> Value {
        let mut out = json!({"username": self.user, "groups": self.groups});
        if !self.uid.is_empty() {
            out["uid"] = self.uid.clone().into();
        }
        if !self.extra.is_empty() {
            out["extra"] = json!(self.extra);
        }
        out
    }
}

/// The common name of a certificate's subject.
pub fn common_name(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    common_name_in(certificate.subject())
}

fn common_name_in(subject: &X509Name<'_>) -> Option<String> {
    subject.iter_common_name().next().and_then(text)
}

fn text(part: &AttributeTypeAndValue<'_>) -> Option<String> {
    part.as_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn certificate(names: &[(DnType, &str)]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params
            .self_signed(&KeyPair::generate().unwrap())
            .unwrap()
            .der()
            .to_vec()
    }

    #[test]
    fn the_subject_is_user_and_groups() {
        let der = certificate(&[
            (DnType::CommonName, "system:node:node-1"),
            (DnType::OrganizationName, "system:nodes"),
        ]);
        let identity = Identity::from_certificate(&der).unwrap();
        assert_eq!(identity.user, "system:node:node-1");
        assert_eq!(identity.groups, ["system:nodes", "system:authenticated"]);
        assert!(identity.in_group("system:nodes") && !identity.in_group("system:masters"));
        assert_eq!(identity.user_info()["username"], "system:node:node-1");
        assert!(identity.extra[CREDENTIAL_ID][0].starts_with("X509SHA256="));
    }

    #[test]
    fn a_certificate_without_a_name_or_that_is_none_is_refused() {
        let nameless = certificate(&[(DnType::OrganizationName, "system:masters")]);
        assert!(
            matches!(Identity::from_certificate(&nameless), Err(AuthError::Certificate(e)) if e.contains("no common name"))
        );
        assert!(Identity::from_certificate(b"nonsense").is_err());
    }
}
