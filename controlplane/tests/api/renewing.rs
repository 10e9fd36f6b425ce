//! `certs renew` that is killed, at each system call by which it changes a file or might.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use keelway_controlplane::pki;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;

const SIGKILL: i32 = 9;
const CALLS: &str = "openat,write,fsync,?rename,renameat,renameat2";
/// What each authority has signed, in files and in kubeconfigs.
const SIGNED: [(&str, &[&str], &[&str]); 2] = [
    (
        "ca",
        &["apiserver", "apiserver-kubelet-client"],
        &["controllers", "scheduler"],
    ),
    ("etcd-ca", &["etcd", "etcd-client"], &[]),
];

fn make(folder: &Path) {
    let write = |name: String, text: String| std::fs::write(folder.join(name), text).unwrap();
    for (signer, files, kubeconfigs) in SIGNED {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        write(format!("{signer}.key"), key.serialize_pem());
        let issuer = CertifiedIssuer::self_signed(authority, key).unwrap();
        write(format!("{signer}.crt"), issuer.pem());
        let sign = || {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &issuer).unwrap();
            (certificate.pem(), key.serialize_pem())
        };
        for name in files {
            let (certificate, key) = sign();
            write(format!("{name}.crt"), certificate);
            write(format!("{name}.key"), key);
        }
        for name in kubeconfigs {
            let (certificate, key) = sign();
            let user = json!({"client-certificate-data": BASE64_STANDARD.encode(certificate),
                "client-key-data": BASE64_STANDARD.encode(key)});
            let kubeconfig = json!({"users": [{"name": name, "user": user}]});
            write(format!("{name}.kubeconfig"), kubeconfig.to_string());
        }
    }
}

/// A certificate and its key.
type Pair = (Vec<u8>, Vec<u8>);

/// Each certificate with its key as they are; they belong together.
fn pairs(folder: &Path) -> Vec<(String, Pair)> {
    let known = pki::known(folder, &[]).expect("all can be read");
    let pair = known.into_iter().map(|known| {
        assert!(known.source.is_pair(), "{}", known.name);
        (known.name, known.source.read().expect("a pair"))
    });
    pair.collect()
}

fn command(words: &[&str], folder: &Path) -> Command {
    let program = env!("CARGO_BIN_EXE_keelway-controlplane");
    let all = [words, &[program, "certs", "renew", "--pki-dir"]].concat();
    let mut command = Command::new(all[0]);
    command.args(&all[1..]).arg(folder);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

#[test]
fn a_renewal_that_is_killed_anywhere_leaves_pairs_and_is_done_again() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: needs root");
        return;
    }
    let original = tempfile::tempdir().unwrap();
    make(original.path());
    let before = pairs(original.path());
    let mut cuts = 0;
    loop {
        let folder = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(original.path()).unwrap().flatten() {
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        let (calls, kill) = (
            format!("trace={CALLS}"),
            format!("inject={CALLS}:signal=KILL:when={}", cuts + 1),
        );
        let words = [
            "strace",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            &calls,
            "-e",
            &kill,
        ];
        let status = command(&words, folder.path()).status().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(status.signal(), Some(SIGKILL), "cut {cuts}");
        cuts += 1;
        // Whoever starts on it has pairs, old ones and new ones.
        pki::finish(folder.path());
        let cut = pairs(folder.path());
        let names = |pairs: &[(String, _)]| -> Vec<String> {
            pairs.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&cut), names(&before), "cut {cuts}");
        let again = command(&[], folder.path()).status().unwrap();
        assert!(again.success(), "cut {cuts}");
        for ((name, old), (_, new)) in before.iter().zip(pairs(folder.path())) {
            let stays = name.ends_with("ca");
            assert_eq!(*old == new, stays, "{name} after cut {cuts}");
        }
        let left = std::fs::read_dir(folder.path()).unwrap().flatten();
        let left = left.filter(|file| file.path().extension().is_some_and(|end| end == "new"));
        assert_eq!(left.count(), 0, "cut {cuts}");
    }
    assert!(cuts > 30, "it was cut off {cuts} times only");
}
