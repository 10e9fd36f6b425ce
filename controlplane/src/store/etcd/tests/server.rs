//! What the store is connected to in tests: one etcd, with certificates or without.

use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
};

use super::process;
use super::*;

pub struct Server {
    pub process: process::Etcd,
    identity: Option<[PathBuf; 3]>,
}

impl Server {
    pub fn start() -> Self {
        Self::start_flagged(&[])
    }

    pub fn start_flagged(flags: &[String]) -> Self {
        Self {
            process: process::Etcd::start("http", flags),
            identity: None,
        }
    }

    /// One that asks for the client's certificate.
    pub fn start_with(tls: &Tls) -> Self {
        let flags = [
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={}", tls.path("ca.crt").display()),
            format!("--cert-file={}", tls.path("server.crt").display()),
            format!("--key-file={}", tls.path("server.key").display()),
        ];
        Self {
            process: process::Etcd::start("https", &flags),
            identity: Some(["ca.crt", "client.crt", "client.key"].map(|name| tls.path(name))),
        }
    }

    pub fn config(&self) -> EtcdConfig {
        let mut config = EtcdConfig::at(vec![self.process.endpoint().to_owned()]);
        if let Some([ca, certificate, key]) = self.identity.clone() {
            config.ca_file = Some(ca);
            config.identity_files = Some((certificate, key));
        }
        config
    }

    pub async fn connect(&self) -> Etcd {
        Etcd::connect(&self.config()).await.expect("etcd answers")
    }
}

/// A certificate authority with a certificate of the server and one of the client.
pub struct Tls {
    folder: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

const DAY: Duration = Duration::from_secs(24 * 3600);

impl Tls {
    pub fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(authority, key).expect("an authority");
        std::fs::write(folder.path().join("ca.crt"), issuer.pem()).expect("the folder takes files");
        let tls = Self { folder, issuer };
        tls.sign("server", "server", ExtendedKeyUsagePurpose::ServerAuth, DAY);
        tls.sign_client(DAY);
        tls
    }

    /// Puts another certificate of the client in the place of the one there is, good for so long.
    pub fn sign_client(&self, life: Duration) {
        self.sign(
            "client",
            "client",
            ExtendedKeyUsagePurpose::ClientAuth,
            life,
        );
    }

    /// As [`Tls::sign_client`], in the name of a user of etcd.
    pub fn sign_user(&self, user: &str) {
        self.sign("client", user, ExtendedKeyUsagePurpose::ClientAuth, DAY);
    }

    fn sign(&self, file: &str, name: &str, usage: ExtendedKeyUsagePurpose, life: Duration) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        let since = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .expect("a clock");
        params.not_after = date_time_ymd(1970, 1, 1) + since + life;
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        for (kind, text) in [("crt", certificate.pem()), ("key", key.serialize_pem())] {
            let path = self.path(&format!("{file}.{kind}"));
            std::fs::write(path, text).expect("the folder takes files");
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
