//! What trouble leaves of the data plane: programs that came off, and pins that are gone.

use std::fs;

use dataplane_abi::ABI_VERSION;
use keelway_agent::dataplane::Error;
use keelway_tests::{
    nodes::{Nodes, PER_PACKET},
    sandbox::{Sandbox, ip, is_root},
};

fn started(test: &str) -> Option<(Sandbox, Nodes)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().unwrap();
    let mut nodes = Nodes::start(&sandbox, PER_PACKET).unwrap();
    nodes.serve(1, "10.96.0.2:80", &["b"]).unwrap();
    nodes.serve(2, "10.96.0.3:80", &["c"]).unwrap();
    Some((sandbox, nodes))
}

#[test]
fn a_program_that_came_off_hangs_again_where_there_is_an_interface() {
    let Some((_sandbox, mut nodes)) = started("repair") else {
        return;
    };
    let first = &mut nodes.nodes[0];
    let host = first.host.try_clone().unwrap();
    let (a, b) = (first.pods["a"].ifindex, first.pods["b"].ifindex);
    let mut repair = || {
        host.run(|| first.dataplane().repair(None, &[a, b]))
            .unwrap()
    };
    assert_eq!(repair(), Vec::<String>::new());
    // An interface goes, and another comes that the kernel knows by the same number: the programs went with the first.
    host.run(|| ip("link del kw-a")).unwrap();
    host.run(|| {
        ip(&format!(
            "link add kw-a index {a} type veth peer name kw-a-peer"
        ))
    })
    .unwrap();
    let mut repaired = repair();
    repaired.sort();
    assert_eq!(
        repaired,
        [format!("pod_egress-{a}"), format!("pod_ingress-{a}")]
    );
    assert_eq!(repair(), Vec::<String>::new());
    // One that is gone for good is forgotten.
    host.run(|| ip("link del kw-b")).unwrap();
    assert_eq!(repair(), Vec::<String>::new());
    let left = host.run(|| first.dataplane().attached_pods()).unwrap();
    assert!(left.contains(&a) && !left.contains(&b), "{left:?}");
}

#[test]
fn pins_that_are_gone_are_an_error_and_not_a_quiet_node() {
    let Some((_sandbox, mut nodes)) = started("pins gone") else {
        return;
    };
    let first = &mut nodes.nodes[0];
    fs::remove_dir_all(first.config.pin_root.join(format!("v{ABI_VERSION}"))).unwrap();
    let error = first.dataplane().repair(None, &[]).unwrap_err();
    assert!(matches!(error, Error::Pins { .. }), "{error}");
}
