//! What each step from the cluster to the maps takes, at three sizes: `cargo bench -p keelway-bench`.
//!
//! Means are per call of a step over the whole cluster, but those called `one`, which are of one Service in it.

use std::hint::black_box;

use cluster_model::{Change, Dirty, Kind, Object, Snapshot, read_manifest};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use keelway_agent::dataplane::{Config, Dataplane, Op, State};
use keelway_agent::plan::{Balancing, Here, Ledger, ServicePlan, check, plan};
use keelway_tests::{lists, sandbox::Sandbox};
use serde_json::Value;

const SIZES: [usize; 3] = [100, 1_000, 10_000];
const ENDPOINTS: usize = 5;

fn here() -> Here {
    Here {
        balancing: Balancing::default(),
        node: "node-1".into(),
        zone: None,
    }
}

fn changes(services: usize) -> [Change; 2] {
    let manifest = Value::from(lists::services(services, ENDPOINTS).concat()).to_string();
    let all = read_manifest(manifest.as_bytes()).expect("a cluster");
    [Kind::Service, Kind::EndpointSlice].map(|kind| {
        let own: Vec<Object> = all
            .iter()
            .filter(|object| object.kind() == kind)
            .cloned()
            .collect();
        Change::Replace(kind, own)
    })
}

fn snapshot(changes: &[Change; 2]) -> (Snapshot, Dirty) {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    for change in changes {
        snapshot.apply(change.clone(), &mut dirty);
    }
    (snapshot, dirty)
}

fn plans(snapshot: &Snapshot, dirty: &Dirty) -> Vec<ServicePlan> {
    let here = here();
    dirty
        .services
        .iter()
        .map(|key| plan(snapshot, key, &here))
        .collect()
}

fn planned(dirty: &Dirty, plans: &[ServicePlan]) -> Ledger {
    let mut ledger = Ledger::adopt(State::default());
    for (key, plan) in dirty.services.iter().zip(plans) {
        ledger.set(key, plan.clone());
    }
    ledger
}

fn steps(criterion: &mut Criterion) {
    for size in SIZES {
        let changes = changes(size);
        let (cluster, dirty) = snapshot(&changes);
        let plans_of_all = plans(&cluster, &dirty);
        let first = dirty.services.first().expect("a Service");
        let here = here();

        let mut group = criterion.benchmark_group("all");
        group.throughput(Throughput::Elements(size as u64));
        group.bench_with_input(
            BenchmarkId::new("snapshot", size),
            &changes,
            |b, changes| {
                b.iter(|| snapshot(black_box(changes)));
            },
        );
        group.bench_function(BenchmarkId::new("plan", size), |b| {
            b.iter(|| plans(black_box(&cluster), &dirty));
        });
        group.bench_function(BenchmarkId::new("check", size), |b| {
            b.iter(|| {
                plans_of_all
                    .iter()
                    .all(|plan| check(black_box(plan)).is_ok())
            });
        });
        group.bench_function(BenchmarkId::new("diff", size), |b| {
            b.iter_batched_ref(
                || planned(&dirty, &plans_of_all),
                Ledger::diff,
                BatchSize::LargeInput,
            );
        });
        group.finish();

        let mut group = criterion.benchmark_group("one");
        group.bench_function(BenchmarkId::new("plan", size), |b| {
            b.iter(|| plan(black_box(&cluster), first, &here));
        });
        let mut ledger = planned(&dirty, &plans_of_all);
        let batch = ledger.diff();
        ledger.applied(&batch);
        let one = plans_of_all.first().expect("a plan").clone();
        group.bench_function(BenchmarkId::new("diff", size), |b| {
            // Gone and back: two changes of the ledger, two batches.
            b.iter(|| {
                for plan in [ServicePlan::default(), one.clone()] {
                    ledger.set(first, plan);
                    let batch = ledger.diff();
                    ledger.applied(black_box(&batch));
                }
            });
        });
        group.finish();
    }
}

/// One Service with very many endpoints, one of which comes and goes.
fn many_endpoints(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one of many endpoints");
    for size in SIZES {
        let manifest = Value::from(lists::services(1, size).concat()).to_string();
        let all = read_manifest(manifest.as_bytes()).expect("a cluster");
        let (mut cluster, mut dirty) = (Snapshot::default(), Dirty::default());
        for object in all {
            cluster.apply(Change::Upsert(object), &mut dirty);
        }
        for kind in [Kind::Service, Kind::EndpointSlice] {
            assert!(cluster.count(kind) > 0, "{kind:?}");
        }
        let key = dirty.services.first().expect("a Service").clone();
        let here = here();
        let (whole, mut fewer) = (plan(&cluster, &key, &here), plan(&cluster, &key, &here));
        for (_, port) in fewer.ports.iter_mut() {
            assert_eq!(port.backends.active.len(), size);
            port.backends.active.remove(size / 2);
        }
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::new("plan", size), |b| {
            b.iter(|| plan(black_box(&cluster), &key, &here));
        });
        group.bench_function(BenchmarkId::new("check", size), |b| {
            b.iter(|| check(black_box(&whole)).is_ok());
        });
        let mut ledger = Ledger::adopt(State::default());
        group.bench_function(BenchmarkId::new("diff", size), |b| {
            // Gone and back: two changes of the ledger, two batches.
            b.iter(|| {
                for plan in [&whole, &fewer] {
                    ledger.set(&key, plan.clone());
                    let batch = ledger.diff();
                    black_box(ledger.loses_backends(&batch));
                    ledger.applied(&batch);
                }
            });
        });
    }
    group.finish();
}

/// Batches into maps of the kernel, as root only.
fn batches(criterion: &mut Criterion) {
    if !keelway_tests::sandbox::is_root("batches") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let mut dataplane = Dataplane::open(&Config::new(sandbox.pin_root())).expect("a data plane");
    let mut group = criterion.benchmark_group("batch");
    for size in SIZES {
        let (cluster, dirty) = snapshot(&changes(size));
        let ops: Vec<Op> = planned(&dirty, &plans(&cluster, &dirty)).diff().ops;
        group.throughput(Throughput::Elements(ops.len() as u64));
        group.bench_function(BenchmarkId::new("apply", size), |b| {
            b.iter(|| dataplane.apply(black_box(&ops)).expect("room in the maps"));
        });
    }
    group.finish();
}

criterion_group! {
    name = all;
    config = Criterion::default().sample_size(20);
    targets = steps, many_endpoints, batches
}
criterion_main!(all);
