//! What the store is connected to in tests: one etcd, with certificates or without.

use std::path::PathBuf;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

use super::process;
use super::*;

pub struct Server {
    pub process: process::Etcd,
    identity: Option<[PathBuf; 3]>,
}

impl Server {
    pub fn start() -> Self {
        Self {
            process: process::Etcd::start("http", &[]),
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
}

impl Tls {
    pub fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(authority, key).expect("an authority");
        let write = |name: &str, text: String| {
            std::fs::write(folder.path().join(name), text).expect("the folder takes files");
        };
        write("ca.crt", issuer.pem());
        let uses = [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ];
        for (name, usage) in uses {
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate().expect("a key");
            let certificate = params.signed_by(&key, &issuer).expect("a certificate");
            write(&format!("{name}.crt"), certificate.pem());
            write(&format!("{name}.key"), key.serialize_pem());
        }
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
