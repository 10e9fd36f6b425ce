//! What the scheduler decides, pod by pod, and what it never does.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::cache::Cache;
use super::decide::{Decision, decide, fits};
use super::preempt::{Preemption, preempt, priority};
use super::resources::{CPU, MEMORY, PODS, needs};

fn node(name: &str, more: Value) -> Arc<Node> {
    let mut value = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10"}},
    });
    merge(&mut value, more);
    Arc::new(serde_json::from_value(value).unwrap())
}

fn pod(name: &str, more: Value) -> Arc<Pod> {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": name, "uid": format!("uid-{name}"), "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "main"}]},
    });
    merge(&mut value, more);
    Arc::new(serde_json::from_value(value).unwrap())
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn cache(nodes: Vec<Arc<Node>>) -> Cache {
    let mut cache = Cache::default();
    for node in nodes {
        cache.put_node(node);
    }
    cache
}

fn asks(cpu: &str) -> Value {
    json!({"spec": {"containers": [{"name": "main", "resources": {"requests": {"cpu": cpu}}}]}})
}

fn owned_by(owner: &str) -> Value {
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": owner, "controller": true});
    json!({"metadata": {"ownerReferences": [owner]}})
}

/// Places pods one after the other; the node of each, or why it has none.
fn place(cache: &mut Cache, pods: impl IntoIterator<Item = Arc<Pod>>) -> Vec<Decision> {
    pods.into_iter()
        .map(|pod| {
            let decision = decide(cache, &pod);
            if let Decision::Node(node) = &decision {
                cache.assume(&pod, node);
            }
            decision
        })
        .collect()
}

fn per_node(decisions: &[Decision]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for decision in decisions {
        if let Decision::Node(node) = decision {
            *counts.entry(node.clone()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn each_reason_against_a_node_is_told_as_kubectl_describe_shows_it() {
    let taint = |effect: &str| json!([{"key": "only", "value": "gpu", "effect": effect}]);
    let port = json!({"spec": {"containers": [{"name": "main", "ports": [{"containerPort": 80, "hostPort": 80}]}]}});
    for (what, node_more, pod_more, expected) in [
        ("cpu", json!({}), asks("3"), "1 Insufficient cpu"),
        (
            "two resources",
            json!({}),
            json!({"spec": {"containers": [{"name": "m", "resources": {"requests": {"cpu": "3", "memory": "5Gi"}}}]}}),
            "1 Insufficient cpu, 1 Insufficient memory",
        ),
        (
            "a device",
            json!({}),
            json!({"spec": {"containers": [{"name": "m", "resources": {"limits": {"vendor/gpu": "1"}}}]}}),
            "1 Insufficient vendor/gpu",
        ),
        (
            "pods",
            json!({"status": {"allocatable": {"pods": "1"}}}),
            json!({}),
            "1 Too many pods",
        ),
        (
            "selector",
            json!({}),
            json!({"spec": {"nodeSelector": {"disk": "ssd"}}}),
            "1 node(s) didn't match Pod's node affinity/selector",
        ),
        (
            "taint",
            json!({"spec": {"taints": taint("NoSchedule")}}),
            json!({}),
            "1 node(s) had untolerated taint {only: gpu}",
        ),
        (
            "closed",
            json!({"spec": {"unschedulable": true}}),
            json!({}),
            "1 node(s) were unschedulable",
        ),
        (
            "port",
            json!({}),
            port.clone(),
            "1 node(s) didn't have free ports for the requested pod ports",
        ),
    ] {
        let mut cache = cache(vec![node("a", node_more)]);
        cache.assume(&pod("there", port.clone()), "a");
        let decision = decide(&cache, &pod("new", pod_more));
        assert_eq!(
            decision,
            Decision::Nowhere(format!("0/1 nodes are available: {expected}.")),
            "{what}"
        );
    }
    assert_eq!(
        decide(&Cache::default(), &pod("new", json!({}))),
        Decision::Nowhere("no nodes available to schedule pods".into())
    );
}

#[test]
fn reasons_of_several_nodes_are_counted() {
    let closed = json!({"spec": {"unschedulable": true}});
    let cache = cache(vec![
        node("a", closed.clone()),
        node("b", closed),
        node("c", json!({})),
    ]);
    assert_eq!(
        decide(&cache, &pod("p", asks("8"))),
        Decision::Nowhere(
            "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) were unschedulable.".into()
        )
    );
}

#[test]
fn tolerated_taints_and_matching_affinity_let_a_pod_in() {
    let tainted = node(
        "a",
        json!({"spec": {"taints": [{"key": "only", "value": "gpu", "effect": "NoSchedule"}]}}),
    );
    let cache = cache(vec![tainted, node("b", json!({}))]);
    let pinned = json!({"spec": {
        "tolerations": [{"key": "only", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]},
        ]}}},
    }});
    assert_eq!(
        decide(&cache, &pod("p", pinned)),
        Decision::Node("a".into())
    );
}

#[test]
fn pods_of_one_owner_spread_over_all_nodes() {
    let mut cache = cache(vec![
        node("a", json!({})),
        node("b", json!({})),
        node("c", json!({})),
    ]);
    // One node is busier: it still gets its share.
    cache.assume(&pod("busy", asks("1")), "a");
    let decisions = place(
        &mut cache,
        (0..6).map(|index| pod(&format!("p{index}"), owned_by("web"))),
    );
    assert_eq!(
        per_node(&decisions).into_values().collect::<Vec<_>>(),
        [2, 2, 2]
    );
}

#[test]
fn pods_without_owner_go_where_there_is_room() {
    let mut cache = cache(vec![node("a", json!({})), node("b", json!({}))]);
    cache.assume(&pod("busy", asks("1500m")), "a");
    let decisions = place(&mut cache, [pod("p", asks("250m")), pod("q", asks("250m"))]);
    assert_eq!(per_node(&decisions), BTreeMap::from([("b".into(), 2)]));
}

#[test]
fn a_preference_outweighs_room_but_not_a_filter() {
    let preferring = json!({"spec": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}},
    ]}}}});
    let ssd = json!({"metadata": {"labels": {"disk": "ssd"}}});
    let mut cache = cache(vec![node("a", ssd), node("b", json!({}))]);
    cache.assume(&pod("busy", asks("1500m")), "a");
    assert_eq!(
        decide(&cache, &pod("p", preferring.clone())),
        Decision::Node("a".into())
    );
    let mut large = preferring;
    merge(&mut large, asks("1"));
    assert_eq!(decide(&cache, &pod("p", large)), Decision::Node("b".into()));
}

#[test]
fn a_required_spread_constraint_holds_pods_back_rather_than_crowding_them() {
    let constrained = json!({"spec": {"topologySpreadConstraints": [{
        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }]}});
    let full = json!({"status": {"allocatable": {"pods": "1"}}});
    let mut cache = cache(vec![node("a", json!({})), node("b", full)]);
    let decisions = place(
        &mut cache,
        (0..4).map(|index| pod(&format!("p{index}"), constrained.clone())),
    );
    assert_eq!(
        per_node(&decisions),
        BTreeMap::from([("a".into(), 2), ("b".into(), 1)])
    );
    let Decision::Nowhere(why) = &decisions[3] else {
        panic!("the fourth must wait: {decisions:?}")
    };
    assert!(
        why.contains("1 node(s) didn't match pod topology spread constraints")
            && why.contains("Too many pods"),
        "{why}"
    );
}

fn affinity(kind: &str, required: bool, selector: Value) -> Value {
    let term = json!({"topologyKey": "kubernetes.io/hostname", "labelSelector": selector});
    let terms = if required {
        json!({"requiredDuringSchedulingIgnoredDuringExecution": [term]})
    } else {
        json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]})
    };
    json!({"spec": {"affinity": {kind: terms}}})
}

#[test]
fn pods_that_keep_apart_get_a_node_each_and_then_wait() {
    let mut cache = cache(vec![node("a", json!({})), node("b", json!({}))]);
    let apart = affinity(
        "podAntiAffinity",
        true,
        json!({"matchLabels": {"app": "web"}}),
    );
    let decisions = place(
        &mut cache,
        (0..3).map(|index| pod(&format!("p{index}"), apart.clone())),
    );
    assert_eq!(
        per_node(&decisions),
        BTreeMap::from([("a".into(), 1), ("b".into(), 1)])
    );
    assert_eq!(
        decisions[2],
        Decision::Nowhere(
            "0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules.".into()
        )
    );
    // It holds the other way round as well: a pod that says nothing is kept away by those that do.
    assert_eq!(
        decide(&cache, &pod("plain", json!({}))),
        Decision::Nowhere(
            "0/2 nodes are available: 2 node(s) didn't satisfy existing pods anti-affinity rules."
                .into()
        )
    );
    let elsewhere = pod("other", json!({"metadata": {"namespace": "elsewhere"}}));
    assert!(
        matches!(decide(&cache, &elsewhere), Decision::Node(_)),
        "terms mean the own namespace only"
    );
    cache.remove_pod("uid-p0");
    assert!(matches!(
        decide(&cache, &pod("again", apart)),
        Decision::Node(_)
    ));
}

#[test]
fn pods_that_belong_together_follow_the_first_of_them() {
    let mut cache = cache(
        (0..4)
            .map(|index| node(&format!("n{index}"), json!({})))
            .collect(),
    );
    let together = affinity("podAffinity", true, json!({"matchLabels": {"app": "web"}}));
    let mut owned = together.clone();
    merge(&mut owned, owned_by("web"));
    let decisions = place(
        &mut cache,
        (0..4).map(|index| pod(&format!("p{index}"), owned.clone())),
    );
    assert_eq!(per_node(&decisions).into_values().collect::<Vec<_>>(), [4]);
    let stranger = affinity(
        "podAffinity",
        true,
        json!({"matchLabels": {"app": "nobody"}}),
    );
    assert_eq!(
        decide(&cache, &pod("stranger", stranger)),
        Decision::Nowhere(
            "0/4 nodes are available: 4 node(s) didn't match pod affinity rules.".into()
        )
    );
}

#[test]
fn liked_company_is_sought_and_disliked_company_avoided_where_possible() {
    let mut cache = cache(vec![node("a", json!({})), node("b", json!({}))]);
    cache.assume(&pod("there", asks("1")), "a");
    let selector = json!({"matchLabels": {"app": "web"}});
    assert_eq!(
        decide(
            &cache,
            &pod("p", affinity("podAffinity", false, selector.clone()))
        ),
        Decision::Node("a".into())
    );
    assert_eq!(
        decide(
            &cache,
            &pod("q", affinity("podAntiAffinity", false, selector.clone()))
        ),
        Decision::Node("b".into())
    );
    let mut large = affinity("podAntiAffinity", false, selector);
    cache.assume(&pod("large", asks("1500m")), "b");
    merge(&mut large, asks("1"));
    assert_eq!(
        decide(&cache, &pod("r", large)),
        Decision::Node("a".into()),
        "a wish gives way to room"
    );
}

#[test]
fn a_term_selects_namespaces_by_their_labels() {
    let mut cache = cache(vec![node("a", json!({})), node("b", json!({}))]);
    cache.namespaces.insert(
        "prod".into(),
        [("tier".to_string(), "prod".to_string())].into(),
    );
    cache.assume(
        &pod("there", json!({"metadata": {"namespace": "prod"}})),
        "a",
    );
    let mut apart = affinity(
        "podAntiAffinity",
        true,
        json!({"matchLabels": {"app": "web"}}),
    );
    let term = &mut apart["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        [0];
    term["namespaceSelector"] = json!({"matchLabels": {"tier": "prod"}});
    assert_eq!(decide(&cache, &pod("p", apart)), Decision::Node("b".into()));
}

#[test]
fn an_assumed_pod_counts_until_its_binding_fails() {
    let mut cache = cache(vec![node("a", json!({}))]);
    let first = pod("first", asks("2"));
    cache.assume(&first, "a");
    // Its unbound state comes in late: it still counts.
    cache.put_pod(&first);
    assert!(matches!(
        decide(&cache, &pod("second", asks("1"))),
        Decision::Nowhere(_)
    ));
    cache.forget("uid-first");
    assert_eq!(
        decide(&cache, &pod("second", asks("1"))),
        Decision::Node("a".into())
    );
}

#[test]
fn ended_and_deleted_pods_make_room_and_pods_count_before_their_node_is_known() {
    let mut bound = asks("2");
    merge(&mut bound, json!({"spec": {"nodeName": "a"}}));
    let mut cache = Cache::default();
    cache.put_pod(&pod("early", bound.clone()));
    cache.put_node(node("a", json!({})));
    assert!(matches!(
        decide(&cache, &pod("p", asks("1"))),
        Decision::Nowhere(_)
    ));
    merge(&mut bound, json!({"status": {"phase": "Succeeded"}}));
    cache.put_pod(&pod("early", bound));
    assert_eq!(
        decide(&cache, &pod("p", asks("1"))),
        Decision::Node("a".into())
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever pods and nodes come and go, no node ever holds more than it has.
    #[test]
    fn no_node_is_ever_overcommitted(
        sizes in prop::collection::vec((1i64..8, 1i64..16, 1i64..12), 1..6),
        steps in prop::collection::vec((0u8..10, 0i64..4000, 0i64..8, any::<bool>(), 0usize..50), 1..120),
    ) {
        let mut cache = Cache::default();
        for (index, (cpu, memory, pods)) in sizes.iter().enumerate() {
            cache.put_node(node(&format!("n{index}"), json!({"status": {"allocatable": {
                "cpu": cpu.to_string(), "memory": format!("{memory}Gi"), "pods": pods.to_string(),
            }}})));
        }
        let mut placed: Vec<Arc<Pod>> = Vec::new();
        for (step, (kind, cpu, memory, port, which)) in steps.into_iter().enumerate() {
            if kind == 0 && !placed.is_empty() {
                let gone = placed.remove(which % placed.len());
                cache.remove_pod(gone.metadata.uid.as_deref().unwrap());
                continue;
            }
            let ports = if port { json!([{"containerPort": 80, "hostPort": 8080}]) } else { json!([]) };
            let new = pod(&format!("p{step}"), json!({"spec": {"containers": [{
                "name": "main", "ports": ports,
                "resources": {"requests": {"cpu": format!("{cpu}m"), "memory": format!("{memory}Gi")}},
            }]}}));
            match decide(&cache, &new) {
                Decision::Node(node) => {
                    cache.assume(&new, &node);
                    placed.push(new);
                }
                Decision::Nowhere(_) => {
                    // Then it really does not fit anywhere.
                    for state in cache.nodes.values() {
                        let wanted = needs(&new);
                        let fits = [CPU, MEMORY, PODS].iter().all(|name| {
                            wanted.get(name) == 0 || state.used.get(name) + wanted.get(name) <= state.allocatable.get(name)
                        });
                        let port_taken = port && state.pods.values().any(|other| !other.ports.is_empty());
                        prop_assert!(!fits || port_taken, "{} had room for {:?}", state.name(), wanted);
                    }
                }
            }
            for state in cache.nodes.values() {
                for name in [CPU, MEMORY, PODS] {
                    prop_assert!(state.used.get(name) <= state.allocatable.get(name), "{name} of {}", state.name());
                }
                let mut sum = super::resources::Amounts::default();
                for placed in state.pods.values() {
                    sum.add(&placed.needs);
                }
                for name in [CPU, MEMORY, PODS] {
                    prop_assert_eq!(sum.get(name), state.used.get(name), "the count of {} drifts", name);
                }
                let ports = state.pods.values().flat_map(|placed| &placed.ports).count();
                prop_assert!(ports <= 1, "one port was given twice on {}", state.name());
            }
        }
    }
}

/// A pod with a priority, taking one of a node's two processors or more.
fn important(name: &str, priority: i32, cpu: &str) -> Arc<Pod> {
    let mut more = asks(cpu);
    merge(&mut more, json!({"spec": {"priority": priority}}));
    pod(name, more)
}

fn victims(preemption: &Preemption) -> Vec<&str> {
    let mut names: Vec<_> = preemption
        .victims
        .iter()
        .map(|pod| pod.metadata.name.as_deref().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn the_least_important_make_way_for_a_more_important_pod() {
    let mut cache = cache(vec![node("a", json!({})), node("b", json!({}))]);
    for (name, priority, on) in [
        ("a1", 5, "a"),
        ("a2", 1, "a"),
        ("b1", 7, "b"),
        ("b2", 8, "b"),
    ] {
        cache.assume(&important(name, priority, "1"), on);
    }
    let found = preempt(&cache, &important("new", 10, "1"), &[]).unwrap();
    assert_eq!((found.node.as_str(), victims(&found)), ("a", vec!["a2"]));
    let found = preempt(&cache, &important("new", 10, "2"), &[]).unwrap();
    assert_eq!(
        (found.node.as_str(), victims(&found)),
        ("a", vec!["a1", "a2"])
    );
    let found = preempt(&cache, &important("new", 3, "2"), &[]).unwrap_err();
    assert_eq!(
        found,
        "0/2 nodes are available: 1 Insufficient cpu, 1 No preemption victims found for incoming pod."
    );
    let mut polite = (*important("new", 10, "1")).clone();
    polite.spec.as_mut().unwrap().preemption_policy = Some("Never".into());
    let refused = preempt(&cache, &Arc::new(polite), &[]).unwrap_err();
    assert_eq!(refused, "not eligible due to preemptionPolicy=Never.");
}

#[test]
fn a_disruption_budget_is_spared_where_another_choice_exists() {
    let mut cache = cache(vec![node("a", json!({})), node("b", json!({}))]);
    cache.assume(&important("guarded", 1, "2"), "a");
    let mut free = (*important("free", 2, "2")).clone();
    free.metadata.labels = None;
    cache.assume(&Arc::new(free), "b");
    let budget = Arc::new(serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": "guard"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}},
        "status": {"disruptionsAllowed": 0, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1},
    })).unwrap());
    let found = preempt(&cache, &important("new", 10, "2"), &[budget]).unwrap();
    assert_eq!(
        victims(&found),
        ["free"],
        "though it is the more important one"
    );
    let found = preempt(&cache, &important("new", 10, "2"), &[]).unwrap();
    assert_eq!(victims(&found), ["guarded"]);
}

#[test]
fn room_that_is_being_made_is_not_taken_by_a_lesser_pod() {
    let mut cache = cache(vec![node("a", json!({}))]);
    cache.assume(&important("old", 1, "1"), "a");
    let waits = important("waits", 10, "1");
    cache.nominate(&waits, "a");
    let lesser = important("lesser", 5, "1");
    assert!(matches!(decide(&cache, &lesser), Decision::Nowhere(_)));
    let greater = important("greater", 11, "1");
    assert_eq!(decide(&cache, &greater), Decision::Node("a".into()));
    assert_eq!(decide(&cache, &waits), Decision::Node("a".into()));
    cache.assume(&waits, "a");
    cache.remove_pod("uid-old");
    assert_eq!(
        decide(&cache, &lesser),
        Decision::Node("a".into()),
        "nothing is kept twice"
    );
}

proptest! {
    /// Whoever makes way is less important, the pod then fits, and every victim is needed for that.
    #[test]
    fn a_preemption_is_enough_and_no_more(
        placed in proptest::collection::vec((0i32..5, 1i64..20, 0usize..3), 0..20), own in 1i32..6, cpu in 1i64..20,
    ) {
        let mut cache = cache((0..3).map(|index| node(&format!("n{index}"), json!({}))).collect());
        for (index, (priority, tenths, on)) in placed.iter().enumerate() {
            let pod = important(&format!("p{index}"), *priority, &format!("{}m", tenths * 100));
            if fits(&cache, &pod, &format!("n{on}")) {
                cache.assume(&pod, &format!("n{on}"));
            }
        }
        let new = important("new", own, &format!("{}m", cpu * 100));
        if let Ok(found) = preempt(&cache, &new, &[]) {
            prop_assert!(found.victims.iter().all(|victim| priority(victim) < own));
            for victim in &found.victims {
                cache.remove_pod(victim.metadata.uid.as_deref().unwrap());
            }
            prop_assert!(fits(&cache, &new, &found.node));
            for victim in &found.victims {
                cache.assume(victim, &found.node);
                prop_assert!(!fits(&cache, &new, &found.node), "{:?} need not go", victim.metadata.name);
                cache.remove_pod(victim.metadata.uid.as_deref().unwrap());
            }
        }
    }
}
