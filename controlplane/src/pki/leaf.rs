//! A certificate that is signed by the cluster's authority: what it says, and the same again for another year.

use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How long a renewed certificate is good, as kubeadm's.
const LIFE_SECONDS: i64 = 365 * 24 * 3600;
/// Clocks of others may be behind by this much.
const BACKDATED_SECONDS: i64 = 300;

/// Why a certificate cannot be signed anew.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error(
        "it is of several organizations ({0}), as none of ours is: whoever made it can make another"
    )]
    Organizations(String),
    #[error(transparent)]
    Sign(#[from] rcgen::Error),
}

/// When a certificate is good, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub from_s: i64,
    pub until_s: i64,
}

impl Life {
    /// Whether it is in the last third of its life, or past it.
    pub fn is_due(self, now_s: i64) -> bool {
        let life_s = (self.until_s - self.from_s).max(0);
        now_s >= self.until_s - life_s / 3
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub client: bool,
    pub server: bool,
    pub is_authority: bool,
    pub life: Life,
}

impl Leaf {
    /// # Errors
    /// When it is no certificate.
    pub fn read(der: &[u8]) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
        let subject = certificate.subject();
        let text = |value: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            value.as_str().unwrap_or_default().to_owned()
        };
        let usages = certificate
            .extended_key_usage()
            .map_err(|e| e.to_string())?;
        let alternatives = certificate
            .subject_alternative_name()
            .map_err(|e| e.to_string())?;
        let alternatives = alternatives.map(|found| found.value.general_names.as_slice());
        let (mut names, mut addresses) = (Vec::new(), Vec::new());
        for alternative in alternatives.unwrap_or_default() {
            match alternative {
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    if let Ok(v4) = <[u8; 4]>::try_from(*bytes) {
                        addresses.push(IpAddr::from(v4));
                    } else if let Ok(v6) = <[u8; 16]>::try_from(*bytes) {
                        addresses.push(IpAddr::from(v6));
                    }
                }
                _ => {}
            }
        }
        let validity = certificate.validity();
        Ok(Self {
            common_name: subject
                .iter_common_name()
                .map(text)
                .next()
                .unwrap_or_default(),
            organizations: subject.iter_organization().map(text).collect(),
            names,
            addresses,
            client: usages.as_ref().is_some_and(|found| found.value.client_auth),
            server: usages.as_ref().is_some_and(|found| found.value.server_auth),
            is_authority: certificate.is_ca(),
            life: Life {
                from_s: validity.not_before.timestamp(),
                until_s: validity.not_after.timestamp(),
            },
        })
    }

    /// The first certificate of a PEM text.
    ///
    /// # Errors
    /// When there is none.
    pub fn of_pem(pem: &[u8]) -> Result<Self, String> {
        use rustls::pki_types::pem::PemObject;
        let der = rustls::pki_types::CertificateDer::from_pem_slice(pem);
        Self::read(&der.map_err(|error| error.to_string())?)
    }

    /// Whom it names, and the groups.
    pub fn subject(&self) -> String {
        let groups = self
            .organizations
            .iter()
            .map(|group| format!(" in {group}"));
        self.common_name.clone() + &groups.collect::<String>()
    }

    /// The same for another key and a year from now: certificate and key, PEM.
    ///
    /// # Errors
    /// When it says what cannot be signed.
    pub fn renewed(
        &self,
        authority: &Issuer<'_, KeyPair>,
        now: Timestamp,
    ) -> Result<(String, String), SignError> {
        // A name has one value of a kind here: signed with one organization, it would lose the groups of the others.
        if self.organizations.len() > 1 {
            return Err(SignError::Organizations(self.organizations.join(", ")));
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for organization in &self.organizations {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization.as_str());
        }
        params
            .distinguished_name
            .push(DnType::CommonName, self.common_name.as_str());
        for name in &self.names {
            let name = SanType::DnsName(name.as_str().try_into()?);
            params.subject_alt_names.push(name);
        }
        let addresses = self.addresses.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names.extend(addresses);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        for (wanted, usage) in [
            (self.client, ExtendedKeyUsagePurpose::ClientAuth),
            (self.server, ExtendedKeyUsagePurpose::ServerAuth),
        ] {
            if wanted {
                params.extended_key_usages.push(usage);
            }
        }
        params.use_authority_key_identifier_extension = true;
        let at = |second: i64| {
            date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(second).unwrap_or(0))
        };
        params.not_before = at(now.as_second() - BACKDATED_SECONDS);
        params.not_after = at(now.as_second() + LIFE_SECONDS);
        let certificate = params.signed_by(&key, authority)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_in_the_last_third_of_its_life() {
        let life = Life {
            from_s: 0,
            until_s: 900,
        };
        assert!(!life.is_due(599));
        assert!(life.is_due(600) && life.is_due(1000));
    }

    #[test]
    fn a_renewed_certificate_says_the_same_for_longer() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = Issuer::new(params, key);
        let old = Leaf {
            common_name: "kube-apiserver".to_owned(),
            organizations: vec!["a".to_owned()],
            names: vec!["kubernetes".to_owned()],
            addresses: vec!["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            client: true,
            server: true,
            is_authority: false,
            life: Life {
                from_s: 0,
                until_s: 0,
            },
        };
        let now = "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap();
        let (certificate, _) = old.renewed(&issuer, now).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).unwrap();
        let new = Leaf::read(&pem.contents).unwrap();
        assert_eq!(new.life.until_s, now.as_second() + LIFE_SECONDS);
        assert_eq!(
            Leaf {
                life: old.life,
                ..new
            },
            old
        );
        let several = Leaf {
            organizations: vec!["a".to_owned(), "b".to_owned()],
            ..old
        };
        let refused = several.renewed(&issuer, now);
        assert!(matches!(refused, Err(SignError::Organizations(_))));
    }
}
