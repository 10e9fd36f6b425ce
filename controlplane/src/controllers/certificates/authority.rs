//! The cluster's CA, as far as it signs what clients ask for by CertificateSigningRequests.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use rcgen::{
    CertificateSigningRequestParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use sha2::{Digest, Sha256};

use crate::auth::MASTERS;
use crate::pki::signing;

/// Clocks of others may be behind by this much.
const BACKDATED_SECONDS: i64 = 300;
/// Longest life of a certificate: upstream's `--cluster-signing-duration`.
const LIFE_SECONDS_MAX: i64 = 365 * 24 * 3600;
/// The signer of certificates that clients show the API server.
pub const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";
const NODES: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";

/// The signers that this cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signer {
    /// Clients of the API server.
    Client,
    /// Kubelets as clients of the API server.
    KubeletClient,
    /// What kubelets serve with.
    KubeletServing,
}

impl Signer {
    pub fn of(name: &str) -> Option<Self> {
        match name {
            CLIENT_SIGNER => Some(Signer::Client),
            "kubernetes.io/kube-apiserver-client-kubelet" => Some(Signer::KubeletClient),
            "kubernetes.io/kubelet-serving" => Some(Signer::KubeletServing),
            _ => None,
        }
    }
}

/// A request that was read.
pub struct Request {
    params: CertificateSigningRequestParams,
    pub common_name: String,
    organizations: Vec<String>,
    usages: BTreeSet<String>,
}

/// Why a request cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("unable to parse csr: {0}")]
    Parse(rcgen::Error),
    #[error("{0}")]
    Refused(&'static str),
    #[error("unable to sign csr: {0}")]
    Sign(rcgen::Error),
    #[error("unable to use the CA's certificate and key: {0}")]
    Authority(String),
}

impl Request {
    /// Reads a request in PEM and checks that whoever made it has the key.
    pub fn read(pem: &[u8], usages: &[String]) -> Result<Self, Error> {
        let text = String::from_utf8_lossy(pem);
        let params = CertificateSigningRequestParams::from_pem(&text).map_err(Error::Parse)?;
        let of_type = |wanted: DnType| -> Vec<String> {
            let all = params.params.distinguished_name.iter();
            all.filter(|(type_, _)| **type_ == wanted)
                .map(|(_, value)| text_of(value))
                .collect()
        };
        Ok(Self {
            common_name: of_type(DnType::CommonName).pop().unwrap_or_default(),
            organizations: of_type(DnType::OrganizationName),
            usages: usages.iter().cloned().collect(),
            params,
        })
    }

    /// The names and addresses that the certificate is to vouch for, as text.
    pub fn hosts(&self) -> Vec<String> {
        let names = self.params.params.subject_alt_names.iter();
        names
            .map(|name| match name {
                SanType::DnsName(name) => name.as_str().to_owned(),
                SanType::IpAddress(address) => address.to_string(),
                other => format!("{other:?}"),
            })
            .collect()
    }

    /// The node that a kubelet's request is for.
    pub fn node(&self) -> &str {
        let name = self.common_name.strip_prefix(NODE_PREFIX);
        name.unwrap_or_default()
    }

    /// Whether the signer signs such requests.
    pub fn check(&self, signer: Signer) -> Result<(), Error> {
        let names = &self.params.params.subject_alt_names;
        let only = |needed: &str| {
            let allowed = ["digital signature", "key encipherment", needed];
            self.usages.contains(needed)
                && self
                    .usages
                    .iter()
                    .all(|usage| allowed.contains(&usage.as_str()))
        };
        let of_node = self.organizations == [NODES] && self.common_name.starts_with(NODE_PREFIX);
        let refused = match signer {
            Signer::Client if self.organizations.iter().any(|name| name == MASTERS) => {
                Some("certificates of system:masters are not signed")
            }
            Signer::Client => {
                (!only("client auth")).then_some("usages did not match [client auth]")
            }
            Signer::KubeletClient if self.organizations != [NODES] => {
                Some("subject organization is not system:nodes")
            }
            Signer::KubeletClient if !of_node => {
                Some("subject common name does not begin with system:node: prefix")
            }
            Signer::KubeletClient if !names.is_empty() => {
                Some("DNS, IP, email and URI subjectAltNames are not allowed")
            }
            Signer::KubeletClient => {
                (!only("client auth")).then_some("usages did not match [client auth]")
            }
            Signer::KubeletServing if !of_node => Some(
                "subject is not of system:nodes, with a common name that begins with system:node:",
            ),
            Signer::KubeletServing if names.is_empty() => {
                Some("DNS or IP subjectAltName is required")
            }
            Signer::KubeletServing
                if !names
                    .iter()
                    .all(|name| matches!(name, SanType::DnsName(_) | SanType::IpAddress(_))) =>
            {
                Some("email and URI subjectAltNames are not allowed")
            }
            Signer::KubeletServing => {
                (!only("server auth")).then_some("usages did not match [server auth]")
            }
        };
        refused.map_or(Ok(()), |why| Err(Error::Refused(why)))
    }
}

/// The organizations of a request in PEM: the groups of whoever shows the certificate.
pub fn organizations(pem: &[u8]) -> Result<Vec<String>, Error> {
    Request::read(pem, &[]).map(|request| request.organizations)
}

fn text_of(value: &DnValue) -> String {
    match value {
        DnValue::Utf8String(text) => text.clone(),
        DnValue::PrintableString(text) => text.as_str().to_string(),
        DnValue::Ia5String(text) => text.as_str().to_string(),
        DnValue::TeletexString(text) => text.as_str().to_string(),
        _ => String::new(),
    }
}

/// Certificate and key of the CA.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// Of the authorities in a PEM text the one whose key this is.
    pub fn new(authorities_pem: &str, key_pem: &str) -> Result<Self, Error> {
        let issuer = signing(authorities_pem, key_pem).map_err(Error::Authority)?;
        Ok(Self { issuer })
    }

    /// A certificate in PEM, for as long as is asked for, a year at most. The serial number follows from `id`, which no two
    /// requests share.
    pub fn sign(
        &self,
        request: &Request,
        id: &str,
        seconds: Option<i32>,
        now: Timestamp,
    ) -> Result<String, Error> {
        let mut csr = request.params.clone();
        let params = &mut csr.params;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages.clear();
        params.extended_key_usages.clear();
        for usage in &request.usages {
            match usage.as_str() {
                "digital signature" => params.key_usages.push(KeyUsagePurpose::DigitalSignature),
                "key encipherment" => params.key_usages.push(KeyUsagePurpose::KeyEncipherment),
                "client auth" => params
                    .extended_key_usages
                    .push(ExtendedKeyUsagePurpose::ClientAuth),
                "server auth" => params
                    .extended_key_usages
                    .push(ExtendedKeyUsagePurpose::ServerAuth),
                _ => return Err(Error::Refused("usages hold one that is not signed here")),
            }
        }
        let life = seconds.map_or(LIFE_SECONDS_MAX, |asked| {
            i64::from(asked).min(LIFE_SECONDS_MAX)
        });
        let at = |second: i64| {
            rcgen::date_time_ymd(1970, 1, 1)
                + Duration::from_secs(u64::try_from(second).unwrap_or(0))
        };
        params.not_before = at(now.as_second() - BACKDATED_SECONDS);
        params.not_after = at(now.as_second() + life);
        params.serial_number = Some(SerialNumber::from_slice(&Sha256::digest(id)[..16]));
        let certificate = csr.signed_by(&self.issuer).map_err(Error::Sign)?;
        Ok(certificate.pem())
    }
}
