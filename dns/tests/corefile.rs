//! Corefiles as clusters have them: what is taken from them, what is refused and how, and what a reload does.

use std::ffi::OsStr;
use std::fs;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser as _;
use keelway_dns::config::files::Files;
use keelway_dns::config::spec::Spec;
use keelway_dns::config::{Config, Flags, read_spec_of, read_spec_on};
use keelway_dns::forward::Order;
use keelway_dns::name::Name;
use keelway_dns::zone::Pods;
use proptest::prelude::*;

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).expect("a temporary folder can be written to");
    path
}

fn read(text: &str) -> Result<Spec, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(
        folder.path(),
        "resolv.conf",
        "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch corp.example\n",
    );
    let text = text.replace(
        "RESOLV",
        &folder.path().join("resolv.conf").display().to_string(),
    );
    write(
        folder.path(),
        "resolv.conf.hosts",
        "192.0.2.9 printer.corp.example.org\n",
    );
    let path = write(folder.path(), "Corefile", &text);
    let resolv = folder.path().join("resolv.conf");
    read_spec_on(&path, &resolv, &mut Files::default()).map_err(|error| error.to_string())
}

fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

/// What kubeadm writes.
const KUBEADM: &str = ".:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . RESOLV {
       max_concurrent 1000
    }
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}
";

#[test]
fn the_corefile_of_kubeadm_is_taken_as_it_is() {
    let spec = read(KUBEADM).expect("a Corefile");
    assert_eq!(spec.port, Some(53));
    assert_eq!(spec.lameduck, Some(Duration::from_secs(5)));
    let ports: Vec<u16> = spec.http.iter().map(|address| address.port()).collect();
    assert_eq!(ports, [8080, 8181, 9153]);
    assert_eq!(spec.zone.origins, [name("cluster.local")]);
    assert_eq!(spec.zone.reverse.len(), 2);
    assert_eq!(spec.zone.pods, Pods::Insecure);
    let [block] = &spec.blocks[..] else {
        panic!("one block")
    };
    assert_eq!(
        block.cluster.as_ref().map(|cluster| cluster.ttl_s),
        Some(30)
    );
    assert_eq!(block.routes[0].servers.len(), 2);
    assert_eq!(block.routes[0].rules.order, Order::Random);
    let cache = block.cache.as_ref().expect("a cache");
    assert_eq!(cache.success.ttl_max, Duration::from_secs(30));
    for share in [&cache.success, &cache.denial] {
        assert_eq!(share.except, [name("cluster.local")]);
    }
    assert!(block.log.errors.is_some() && !block.log.is_on());
}

#[test]
fn what_a_corefile_gives_no_address_is_heard_in_both_families() {
    if UdpSocket::bind("[::1]:0").is_err() {
        return println!("skipped: needs IPv6");
    }
    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        flags: Flags,
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = ".:53 {\n health\n ready\n prometheus :9153\n kubernetes cluster.local\n}\n";
    let file = write(folder.path(), "Corefile", text);
    let configured = |flags: &[&str]| {
        let flags = ["serve"].iter().chain(flags).map(OsStr::new);
        let program = Program::parse_from(flags.chain([OsStr::new("--config"), file.as_os_str()]));
        Config::try_from(program.flags).expect("a configuration")
    };
    // The flag and the Corefile may name one port; only one of them can have it.
    assert_eq!(configured(&["--health", "0.0.0.0:8181"]).http.len(), 3);
    let config = configured(&[]);
    assert_eq!((config.listen.port(), config.http.len()), (53, 3));
    for address in config.http.iter().chain([&config.listen]) {
        let listener = TcpListener::bind((address.ip(), 0)).expect("a listener");
        let port = listener.local_addr().expect("bound").port();
        for client in ["127.0.0.1", "::1"] {
            TcpStream::connect((client, port))
                .unwrap_or_else(|error| panic!("{client} to {address}: {error}"));
        }
    }
}

#[test]
fn stub_domains_rewrites_hosts_and_snippets_are_taken() {
    let spec = read(
        "(outside) {
            forward . 192.0.2.1 192.0.2.2:5353 {
                policy sequential
                health_check 1s
                max_fails 3
                except internal.example
            }
            cache 900 example.org {
                success 5000 600 5
                denial 100
                prefetch 10 1m 20%
                serve_stale 2h immediate
            }
        }
        corp.example, 10.0.0.0/8 {
            forward . tls://192.0.2.53%dns.corp.example
        }
        . {
            log . {
                class denial error
            }
            rewrite name suffix .old.example .prod.svc.cluster.local answer auto
            rewrite continue name exact a.example b.example
            hosts {
                192.0.2.9 printer.example printer
                ttl 60
                fallthrough
            }
            kubernetes cluster.local k8s.example {
                pods verified
                endpoint_pod_names
            }
            transfer {
                to 10.0.0.0/8 192.0.2.77
            }
            autopath RESOLV
            import outside
        }",
    )
    .expect("a Corefile");
    assert_eq!(
        spec.blocks[0].zones,
        [name("corp.example"), name("10.in-addr.arpa")]
    );
    let tls = spec.blocks[0].routes[0].servers[0]
        .tls
        .as_ref()
        .expect("TLS");
    assert_eq!(tls.name, "dns.corp.example");
    assert_eq!(spec.blocks[0].routes[0].servers[0].address.port(), 853);
    let block = &spec.blocks[1];
    assert_eq!(spec.zone.origins.len(), 2);
    assert_eq!(block.rewrites.len(), 2);
    assert!(block.rewrites[1].goes_on);
    let hosts = block.hosts.as_ref().expect("hosts");
    assert_eq!((hosts.len(), hosts.ttl_s), (2, 60));
    assert_eq!(
        block.cluster.as_ref().map(|cluster| cluster.transfer.len()),
        Some(2)
    );
    let autopath = block.autopath.as_ref().expect("autopath");
    assert_eq!(autopath.search, [name("corp.example")]);
    let cache = block.cache.as_ref().expect("a cache");
    assert_eq!(
        (cache.success.entries_max, cache.denial.entries_max),
        (5000, 100)
    );
    assert_eq!((cache.prefetch_hits, cache.prefetch_percent), (10, 20));
    assert!(cache.stale_immediately);
    assert_eq!(cache.zones, [name("example.org")]);
    let rules = &block.routes[0].rules;
    assert_eq!((rules.order, rules.failures_max), (Order::Sequential, 3));
    assert_eq!(block.routes[0].except, [name("internal.example")]);
}

#[test]
fn files_beside_it_are_imported_in_their_order() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), "b.override", "cache 10\n");
    write(folder.path(), "a.override", "errors\n");
    write(
        folder.path(),
        "stub.server",
        "corp.example {\n forward . 192.0.2.1\n}\n",
    );
    let text =
        "import *.server\n. {\n import *.override\n import *.absent\n forward . 192.0.2.2\n}\n";
    let path = write(folder.path(), "Corefile", text);
    let mut files = Files::default();
    let spec = read_spec_of(&path, &mut files).expect("a Corefile");
    assert_eq!(spec.blocks.len(), 2);
    assert!(spec.blocks[1].log.errors.is_some() && spec.blocks[1].cache.is_some());
    assert_eq!(files.paths().count(), 4, "{files:?}");
}

#[test]
fn imports_that_lead_back_or_multiply_are_an_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let fail = |text: &str| {
        let path = write(folder.path(), "Corefile", text);
        let read = read_spec_of(&path, &mut Files::default());
        read.expect_err(text).to_string()
    };
    for text in [
        "import Corefile\n. {\n errors\n}\n",
        "import *\n. {\n errors\n}\n",
        "(again) {\n import again\n}\n. {\n import again\n}\n",
    ] {
        let error = fail(text);
        assert!(error.contains("imports go round in circles"), "{error}");
    }
    // Each brings ten of the next.
    let snippets =
        (1..=6).map(|i| format!("({i}) {{\n{}}}\n", format!("import {}\n", i - 1).repeat(10)));
    let text = ["(0) {\n errors\n}\n".to_owned()]
        .into_iter()
        .chain(snippets);
    let text: String = text.chain([". {\n import 6\n}\n".to_owned()]).collect();
    let error = fail(&text);
    assert!(error.contains("more than 1000 imports"), "{error}");
}

#[test]
fn a_change_is_seen_wherever_it_is_also_after_an_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = ". {\n import custom/*.override\n forward . RESOLV\n}\n";
    let resolv = write(folder.path(), "resolv.conf", "nameserver 192.0.2.1\n");
    let text = text.replace("RESOLV", &resolv.display().to_string());
    let path = write(folder.path(), "Corefile", &text);
    let custom = folder.path().join("custom");
    fs::create_dir(&custom).expect("a folder");
    let read = || {
        let mut files = Files::default();
        let spec = read_spec_of(&path, &mut files);
        (spec.map_err(|error| error.to_string()), files)
    };
    let (spec, files) = read();
    assert!(spec.is_ok_and(|spec| spec.blocks[0].log.errors.is_none()) && !files.have_changed());
    // A file that was not there, by a pattern.
    let new = write(&custom, "a.override", "errors {\n");
    assert!(files.have_changed());
    let (spec, files) = read();
    assert!(spec.is_err_and(|error| error.contains("a.override")));
    assert!(!files.have_changed());
    // The error is in a file that no good configuration has ever named.
    write(&custom, "a.override", "errors\n");
    assert!(files.have_changed());
    let (spec, files) = read();
    assert!(spec.is_ok_and(|spec| spec.blocks[0].log.errors.is_some()) && !files.have_changed());
    write(folder.path(), "resolv.conf", "nameserver 192.0.2.2\n");
    assert!(files.have_changed());
    let (_, files) = read();
    fs::remove_file(&new).expect("removed");
    assert!(files.have_changed());
}

#[test]
fn what_changes_no_answer_is_named_and_all_else_is_done() {
    let spec = read(
        "example.org {
            cache 30 example.org
            hosts RESOLV.hosts corp.example.org {
                fallthrough
            }
            forward . 192.0.2.1 {
                health_check 1s no_rec domain probe.example
            }
        }
        . {
            errors {
                consolidate 5m \".* i/o timeout$\" warning
                consolidate 30s \"^Failed to .+\" show_first
                stacktrace
            }
            ready {
                monitor until-ready
            }
            loadbalance round_robin
            log example.org corp.example {common} {
                class error
            }
            rewrite stop {
                name regex (.*)\\.old\\.example\\. {1}.prod.svc.cluster.local
                answer name (.*)\\.prod\\.svc\\.cluster\\.local\\. {1}.old.example
            }
            transfer cluster.local {
                to *
            }
            kubernetes cluster.local
            autopath cluster.local @kubernetes
        }",
    );
    let spec = spec.expect("a Corefile");
    let told = spec.warnings.join(" ");
    assert!(
        told.contains("stacktrace") && told.contains("until-ready"),
        "{told}"
    );
    let [first, block] = &spec.blocks[..] else {
        panic!("two blocks")
    };
    let rules = &first.routes[0].rules;
    assert_eq!(
        (&rules.check_name, rules.check_recursive),
        (&name("probe.example"), false)
    );
    let hosts = first.hosts.as_ref().expect("hosts");
    assert_eq!(
        (hosts.len(), &hosts.zones[..]),
        (1, &[name("corp.example.org")][..])
    );
    assert_eq!(
        block.log.queries[0].zones,
        [name("example.org"), name("corp.example")]
    );
    let errors = block.log.errors.as_ref().expect("errors");
    let [timeouts, others] = &errors.consolidated[..] else {
        panic!("two rules")
    };
    assert_eq!(
        (timeouts.during, timeouts.level, timeouts.shows_first),
        (Duration::from_secs(300), tracing::Level::WARN, false)
    );
    assert_eq!(others.like.as_str(), "^Failed to .+");
    assert!(others.level == tracing::Level::ERROR && others.shows_first);
    assert_eq!(block.rewrites.len(), 1);
    assert!(!block.rewrites[0].goes_on);
    let cluster = block.cluster.as_ref().expect("a cluster");
    assert_eq!((cluster.transfer.len(), cluster.ttl_s), (2, 5));
    // As CoreDNS: the process's own search domains come after the cluster's.
    let autopath = block.autopath.as_ref().expect("autopath");
    assert_eq!(autopath.zones, [name("cluster.local")]);
    assert_eq!(autopath.search, [name("corp.example")]);
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    let cases = [
        (". {\n forward . 192.0.2.1\n", "closing brace"),
        (
            ". {\n template IN A\n}",
            ":2: template: this plugin is not supported",
        ),
        (". {\n forward . ten\n}", ":2: ten: is not an address"),
        (". {\n forward .\n}", ":2: forward: names no server"),
        (
            ". {\n cache {\n  success many\n }\n}",
            ":3: many: is not a number",
        ),
        (
            ". {\n cache {\n  disable everything\n }\n}",
            ":3: everything: is not success or denial",
        ),
        (
            ". {\n kubernetes cluster.local {\n  pods maybe\n }\n}",
            ":3: maybe: is not disabled",
        ),
        (
            ". {\n kubernetes cluster.local {\n  namespaces a\n }\n}",
            ":3: namespaces: this option",
        ),
        (".:53 {\n}\n.:54 {\n}", "one server has one port"),
        ("tls://. {\n}", "only plain DNS"),
        (
            ". {\n kubernetes a.example\n}\nb.example {\n kubernetes b.example\n}",
            "another block already",
        ),
        (". {\n rewrite name regex ( x\n}", ":2: (: regex"),
        (
            ". {\n rewrite name a.example b.example answer value x y\n}",
            ":2: answer: only answer auto",
        ),
        (". {\n log . {name}\n}", ":2: {name}: another format"),
        (
            ". {\n loadbalance weighted file\n}",
            ":2: weighted: is not known",
        ),
        (
            ". {\n transfer {\n  to *\n }\n}",
            ":2: transfer: is for the zone of kubernetes",
        ),
        (
            ". {\n transfer example.org {\n  to *\n }\n kubernetes cluster.local\n}",
            ":2: example.org: is no zone of kubernetes",
        ),
        (". {\n errors {\n  else\n }\n}", ":3: else: errors knows"),
        (". {\n errors file\n}", ":2: file: is not known"),
        (
            ". {\n errors {\n  consolidate 5m\n }\n}",
            ":3: consolidate: takes a duration",
        ),
        (
            ". {\n errors {\n  consolidate 5m (\n }\n}",
            ":3: (: regex parse error",
        ),
        (
            ". {\n errors {\n  consolidate 5m . loud\n }\n}",
            ":3: loud: is not warning",
        ),
        (". {\n autopath @file\n}", ":2: @file: is not @kubernetes"),
        (". {\n hosts {\n  here a.example\n }\n}", ":3: here"),
        (
            ". {\n forward . /nowhere/resolv.conf\n}",
            "/nowhere/resolv.conf",
        ),
        ("", "has no block"),
    ];
    for (text, expected) in cases {
        let error = read(text).expect_err(text);
        assert!(
            error.contains(expected),
            "{text:?}: {error:?} does not tell {expected:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(words in prop::collection::vec(
        prop_oneof![
            prop::sample::select(vec![
                "{", "}", "\n", ".", "forward", "cache", "kubernetes", "hosts", "rewrite", "name", "regex", "log", "class",
                "import", "\"", "#", "10.0.0.0/8", "::/0", "tls://1.2.3.4%a:1", "1m", "999999999999h", "prefetch", "1", "health",
            ]).prop_map(str::to_owned),
            "\\PC{0,6}",
        ], 0..40)) {
        // An error or a configuration: either is fine.
        let _ = read(&words.join(" "));
    }
}
