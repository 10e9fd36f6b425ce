//! The credentials of a cluster: one certificate authority, and what it signs.
//!
//! Names follow kubeadm's where clients or authorizers look at them: `system:masters`, `system:nodes`, `system:node:<name>`.

pub mod succession;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use jiff::ToSpan;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::kubeconfig;
use succession::signing;

/// A development cluster lives for days; its certificates must not be what ends it. So does an authority, which is not renewed.
const YEARS: i64 = 10;

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("cannot make the credentials of {subject}: {source}")]
    Make {
        subject: String,
        source: rcgen::Error,
    },
    #[error("the key of the authority is of none of its certificates")]
    Stranger,
}

fn make(subject: &str) -> impl FnOnce(rcgen::Error) -> PkiError {
    let subject = subject.to_owned();
    move |source| PkiError::Make { subject, source }
}

/// A certificate and its private key, both PEM.
#[derive(Debug, Clone)]
pub struct Credential {
    pub certificate: String,
    pub key: String,
}

/// A certificate authority that is in memory while a cluster comes up.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// How long what it signs is good.
    years: i64,
    pub credential: Credential,
}

/// What a serving certificate vouches for.
#[derive(Debug, Clone, Default)]
pub struct Names {
    pub dns: Vec<String>,
    pub addresses: Vec<IpAddr>,
}

impl Authority {
    /// A new authority, of which nothing else in the world knows.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub fn new(cluster: &str, years: i64) -> Result<Self, PkiError> {
        let name = format!("keelway-{cluster}-ca");
        let key = KeyPair::generate().map_err(make(&name))?;
        let params = authority(&name).map_err(make(&name))?;
        let certificate = params.self_signed(&key).map_err(make(&name))?;
        let credential = Credential {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        };
        Ok(Authority {
            issuer: Issuer::new(params, key),
            years,
            credential,
        })
    }

    /// One that is kept elsewhere too; of several certificates the one counts whose key this is.
    ///
    /// # Errors
    /// When the key is of none of them.
    pub fn load(credential: Credential, years: i64) -> Result<Self, PkiError> {
        let issuer = signing(&credential)?;
        Ok(Authority {
            issuer,
            years,
            credential,
        })
    }

    /// A credential with which a client says that it is `user`, of `group` if that is given.
    ///
    /// # Errors
    /// When the names cannot be put into a certificate.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Credential, PkiError> {
        self.sign(
            user,
            group,
            &Names::default(),
            &[ExtendedKeyUsagePurpose::ClientAuth],
        )
    }

    /// A credential with which a server proves that it is one of `names`.
    ///
    /// # Errors
    /// When the names cannot be put into a certificate.
    pub fn server(&self, subject: &str, names: &Names) -> Result<Credential, PkiError> {
        self.sign(subject, None, names, &[ExtendedKeyUsagePurpose::ServerAuth])
    }

    /// A credential of a member of etcd, which is a server of clients and both to other members.
    ///
    /// # Errors
    /// When the names cannot be put into a certificate.
    pub fn member(&self, subject: &str, names: &Names) -> Result<Credential, PkiError> {
        let both = [
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.sign(subject, None, names, &both)
    }

    fn sign(
        &self,
        subject: &str,
        group: Option<&str>,
        names: &Names,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> Result<Credential, PkiError> {
        let key = KeyPair::generate().map_err(make(subject))?;
        let mut params = params(subject, group, names, self.years).map_err(make(subject))?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(make(subject))?;
        Ok(Credential {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

fn params(
    common_name: &str,
    organization: Option<&str>,
    names: &Names,
    years: i64,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(organization) = organization {
        params
            .distinguished_name
            .push(DnType::OrganizationName, organization);
    }
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    for name in &names.dns {
        params
            .subject_alt_names
            .push(SanType::DnsName(name.as_str().try_into()?));
    }
    params
        .subject_alt_names
        .extend(names.addresses.iter().copied().map(SanType::IpAddress));
    // A day ago, for clients whose clock is behind.
    let today = jiff::Zoned::now()
        .with_time_zone(jiff::tz::TimeZone::UTC)
        .date();
    let (from, to) = (
        today.saturating_sub(1.day()),
        today.saturating_add(years.years()),
    );
    let date = |day: jiff::civil::Date| {
        date_time_ymd(
            day.year().into(),
            day.month().unsigned_abs(),
            day.day().unsigned_abs(),
        )
    };
    (params.not_before, params.not_after) = (date(from), date(to));
    Ok(params)
}

fn authority(name: &str) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(name, None, &Names::default(), YEARS)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    Ok(params)
}

/// What the members of an etcd need, and its client. The authority is one of its own: etcd lets in whom it has signed.
pub struct EtcdPki {
    pub ca: Credential,
    pub client: Credential,
    /// In the order of the members.
    pub members: Vec<Credential>,
}

impl EtcdPki {
    /// Makes the credentials of members, each given by its name and addresses; `renewed` as in [`Subjects`].
    ///
    /// # Errors
    /// Names the subject whose credential could not be made.
    pub fn new(
        cluster: &str,
        members: &[(String, Vec<IpAddr>)],
        renewed: bool,
    ) -> Result<Self, PkiError> {
        let authority = Authority::new(&format!("{cluster}-etcd"), years(renewed))?;
        let member = |(name, addresses): &(String, Vec<IpAddr>)| {
            authority.member(name, &Self::names(name, addresses.clone()))
        };
        Ok(EtcdPki {
            client: authority.client("keelway-controlplane", None)?,
            members: members.iter().map(member).collect::<Result<_, _>>()?,
            ca: authority.credential,
        })
    }

    /// Makes the credential of one member more, by the authority that there is; its control plane renews it.
    ///
    /// # Errors
    /// When the authority is none, or the credential cannot be made.
    pub fn member(
        authority: Credential,
        name: &str,
        address: IpAddr,
    ) -> Result<Credential, PkiError> {
        Authority::load(authority, years(true))?.member(name, &Self::names(name, vec![address]))
    }

    fn names(name: &str, addresses: Vec<IpAddr>) -> Names {
        Names {
            dns: vec![name.to_owned(), "localhost".to_owned()],
            addresses: with_loopback(addresses),
        }
    }
}

/// Everything the nodes of one cluster need.
pub struct ClusterPki {
    pub ca: Credential,
    pub apiserver: Credential,
    pub apiserver_kubelet_client: Credential,
    pub controllers: Credential,
    pub scheduler: Credential,
    pub admin: Credential,
    /// Signs ServiceAccount tokens: private and public key, PEM.
    pub service_accounts: (String, String),
    /// Per worker, in order: as a client of the API server, and as the server of logs and exec.
    pub kubelets: Vec<(Credential, Credential)>,
}

/// The workers, and where the API server is reached.
#[derive(Debug, Clone)]
pub struct Subjects<'a> {
    pub cluster: &'a str,
    pub control_plane: Vec<IpAddr>,
    /// Other addresses and names that clients reach the API server by.
    pub names: Vec<String>,
    /// The first address of each Service range, `default/kubernetes`.
    pub services: Vec<IpAddr>,
    pub workers: Vec<(String, Vec<IpAddr>)>,
    /// They are renewed by the control plane, so that they need not be good for as long as the cluster lives.
    pub renewed: bool,
}

impl Subjects<'_> {
    /// How long certificates are good.
    pub fn years(&self) -> i64 {
        years(self.renewed)
    }
}

fn years(renewed: bool) -> i64 {
    if renewed { 1 } else { YEARS }
}

fn with_loopback(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.extend([
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ]);
    addresses
}

impl ClusterPki {
    /// Makes all credentials of a cluster.
    ///
    /// # Errors
    /// Names the subject whose credential could not be made.
    pub fn new(subjects: &Subjects<'_>) -> Result<Self, PkiError> {
        let authority = Authority::new(subjects.cluster, subjects.years())?;
        let tokens = KeyPair::generate().map_err(make("service accounts"))?;
        let tokens = (tokens.serialize_pem(), tokens.public_key_pem());
        Self::of(authority, tokens, subjects)
    }

    /// Makes what one more control plane needs, by the authority and the key of ServiceAccounts that the cluster has.
    ///
    /// # Errors
    /// Names the subject whose credential could not be made.
    pub fn of(
        authority: Authority,
        service_accounts: (String, String),
        subjects: &Subjects<'_>,
    ) -> Result<Self, PkiError> {
        let mut apiserver = Names {
            dns: [
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "kubernetes.default.svc.cluster.local",
            ]
            .map(String::from)
            .to_vec(),
            addresses: with_loopback([&subjects.services[..], &subjects.control_plane].concat()),
        };
        for name in &subjects.names {
            match name.parse() {
                Ok(address) => apiserver.addresses.push(address),
                Err(_) => apiserver.dns.push(name.clone()),
            }
        }
        let kubelets = subjects
            .workers
            .iter()
            .map(|(name, addresses)| {
                let user = format!("system:node:{name}");
                let names = Names {
                    dns: vec![name.clone()],
                    addresses: with_loopback(addresses.clone()),
                };
                Ok((
                    authority.client(&user, Some("system:nodes"))?,
                    authority.server(&user, &names)?,
                ))
            })
            .collect::<Result<_, PkiError>>()?;
        Ok(ClusterPki {
            apiserver: authority.server("kube-apiserver", &apiserver)?,
            // What these may do is bound to their names.
            apiserver_kubelet_client: authority.client("kube-apiserver-kubelet-client", None)?,
            controllers: authority.client("system:keelway-controllers", None)?,
            scheduler: authority.client("system:kube-scheduler", None)?,
            admin: authority.client("keelway-admin", Some("system:masters"))?,
            service_accounts,
            kubelets,
            ca: authority.credential,
        })
    }

    /// The files of a control plane's folder of credentials. Its own parts reach it at `port` of the loopback.
    pub fn control_plane_files(&self, port: u16) -> Vec<(&'static str, String)> {
        let local = format!("https://127.0.0.1:{port}");
        let kubeconfig = |name: &str, client: &Credential| {
            let config = kubeconfig::single(name, &local, &self.ca.certificate, client);
            kubeconfig::to_yaml(&config)
        };
        let (token_key, token_public) = &self.service_accounts;
        let to_kubelets = &self.apiserver_kubelet_client;
        vec![
            ("ca.crt", self.ca.certificate.clone()),
            ("ca.key", self.ca.key.clone()),
            ("apiserver.crt", self.apiserver.certificate.clone()),
            ("apiserver.key", self.apiserver.key.clone()),
            (
                "apiserver-kubelet-client.crt",
                to_kubelets.certificate.clone(),
            ),
            ("apiserver-kubelet-client.key", to_kubelets.key.clone()),
            ("sa.key", token_key.clone()),
            ("sa.pub", token_public.clone()),
            (
                "controllers.kubeconfig",
                kubeconfig("controllers", &self.controllers),
            ),
            (
                "scheduler.kubeconfig",
                kubeconfig("scheduler", &self.scheduler),
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::*;

    fn cluster() -> ClusterPki {
        let addresses = |texts: &[&str]| -> Vec<IpAddr> {
            let parsed = texts.iter().map(|text| text.parse().expect("an address"));
            parsed.collect()
        };
        ClusterPki::new(&Subjects {
            cluster: "test",
            control_plane: addresses(&["198.18.0.2", "2001:2::2"]),
            names: vec!["api.example.org".to_owned(), "192.0.2.7".to_owned()],
            services: addresses(&["10.96.0.1", "fd00:10:96::1"]),
            renewed: false,
            workers: vec![(
                "node-1".to_owned(),
                addresses(&["198.18.0.11", "2001:2::b"]),
            )],
        })
        .expect("made")
    }

    fn with_certificate(pem: &str, check: impl FnOnce(&X509Certificate<'_>)) {
        let (_, pem) = parse_x509_pem(pem.as_bytes()).expect("PEM");
        let (_, certificate) = X509Certificate::from_der(&pem.contents).expect("a certificate");
        check(&certificate);
    }

    #[test]
    fn every_leaf_verifies_against_the_authority() {
        let pki = cluster();
        let leaves = [
            &pki.apiserver,
            &pki.apiserver_kubelet_client,
            &pki.controllers,
            &pki.scheduler,
            &pki.admin,
            &pki.kubelets[0].0,
            &pki.kubelets[0].1,
        ];
        with_certificate(&pki.ca.certificate, |ca| {
            assert!(ca.is_ca());
            for leaf in leaves {
                with_certificate(&leaf.certificate, |leaf| {
                    leaf.verify_signature(Some(ca.public_key()))
                        .expect("signed by the authority");
                    assert!(!leaf.is_ca());
                    assert!(leaf.validity().is_valid());
                });
            }
        });
    }

    #[test]
    fn kubelet_clients_are_named_as_the_node_authorizer_expects() {
        with_certificate(&cluster().kubelets[0].0.certificate, |certificate| {
            let subject = certificate.subject();
            let name = subject
                .iter_common_name()
                .next()
                .and_then(|name| name.as_str().ok());
            let group = subject
                .iter_organization()
                .next()
                .and_then(|name| name.as_str().ok());
            assert_eq!(
                (name, group),
                (Some("system:node:node-1"), Some("system:nodes"))
            );
            let usage = certificate
                .extended_key_usage()
                .expect("read")
                .expect("present")
                .value;
            assert!(usage.client_auth && !usage.server_auth);
        });
    }

    #[test]
    fn the_api_server_vouches_for_every_name_it_is_reached_by() {
        with_certificate(&cluster().apiserver.certificate, |certificate| {
            let names = certificate
                .subject_alternative_name()
                .expect("read")
                .expect("present")
                .value;
            let names: Vec<String> = names
                .general_names
                .iter()
                .map(|name| match name {
                    GeneralName::DNSName(name) => (*name).to_owned(),
                    GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
                        Ok(v4) => Ipv4Addr::from(v4).to_string(),
                        Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(*bytes).expect("16 bytes"))
                            .to_string(),
                    },
                    other => format!("{other:?}"),
                })
                .collect();
            for wanted in [
                "10.96.0.1",
                "198.18.0.2",
                "127.0.0.1",
                "fd00:10:96::1",
                "2001:2::2",
                "::1",
                "localhost",
                "kubernetes",
                "kubernetes.default.svc.cluster.local",
                "api.example.org",
                "192.0.2.7",
            ] {
                assert!(
                    names.iter().any(|name| name == wanted),
                    "{wanted} is not in {names:?}"
                );
            }
        });
    }

    #[test]
    fn token_keys_are_a_pair_of_elliptic_curve_keys() {
        let (private, public) = cluster().service_accounts;
        let pair = KeyPair::from_pem(&private).expect("a private key");
        assert_eq!(pair.public_key_pem(), public);
        assert!(pair.is_compatible(&rcgen::PKCS_ECDSA_P256_SHA256));
    }
}
