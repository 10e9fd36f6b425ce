//! A whole cluster, used the way people use one: by kubectl, from pods, and from nodes.
//!
//! One cluster serves all scenarios, since the state that one leaves is what the next one's users would find. Scenarios run in
//! the order given, each is named in the output, and a failing one does not keep the others from running.
//! `KEELWAY_E2E_CLUSTER` names a running cluster of this machine to use, `KEELWAY_E2E_KUBECONFIG` any Kubernetes, and
//! `KEELWAY_E2E_ONLY` runs those whose name contains it, or one of several with commas between them.
#![forbid(unsafe_code)]

mod access;
mod away;
mod balancer;
mod changes;
mod connectivity;
mod faults;
mod helm;
mod kubectl;
mod names;
mod operate;
mod rollout;
mod services;
mod streams;
mod wrong_input;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use keelway_tests::cluster::Cluster;
use keelway_tests::machine::MachineState;

/// A scenario, and whether it needs to see the nodes from the machine.
struct Scenario {
    name: &'static str,
    run: fn(&Cluster),
    needs_nodes: bool,
}

macro_rules! scenarios {
    ($($module:ident :: $name:ident $($nodes:literal)?),* $(,)?) => {
        &[$(Scenario {
            name: concat!(stringify!($module), "::", stringify!($name)),
            run: $module::$name,
            needs_nodes: matches!(concat!($($nodes)?).len(), 1..),
        }),*]
    };
}

const SCENARIOS: &[Scenario] = scenarios![
    services::hello_becomes_ready_on_more_than_one_node,
    services::a_service_answers_by_name_from_every_replica,
    services::a_service_answers_by_address_and_by_udp,
    services::a_service_answers_the_nodes_own_programs "nodes",
    services::pods_reach_each_other_and_their_node_across_nodes "nodes",
    services::a_service_without_endpoints_refuses_at_once,
    services::cluster_dns_answers_services_pods_and_reverse_names,
    operate::services_are_listed_and_shown_with_their_pods,
    operate::the_monitor_names_pods_services_and_reasons,
    operate::flows_are_listed_by_name_and_flushed "nodes",
    operate::services_that_cannot_have_what_they_want_are_told_so "nodes",
    operate::a_pods_bandwidth_is_what_its_annotations_say "nodes",
    connectivity::every_pair_of_nodes_is_told_with_its_latency "nodes",
    balancer::a_service_gets_an_address_that_answers_from_outside "nodes",
    balancer::another_agent_gives_out_addresses_when_the_holder_of_the_lease_is_gone "nodes",
    balancer::an_address_is_served_by_another_node_when_its_node_is_cut_off "nodes",
    names::every_resolver_finds_services_by_every_spelling "nodes",
    names::busybox_programs_go_through_the_search_path,
    names::a_headless_name_of_a_thousand_endpoints_is_resolved_whole "nodes",
    names::two_questions_at_once_from_one_socket_are_both_answered "nodes",
    names::a_plain_deployment_of_the_dns_works_too "nodes",
    kubectl::get_all_lists_what_was_made,
    kubectl::describe_tells_of_pods_services_and_nodes,
    kubectl::logs_follow_a_running_container,
    kubectl::exec_runs_programs_with_input_status_and_terminal,
    kubectl::get_watch_reports_changes_as_they_happen,
    kubectl::labels_scale_and_wait_work_together,
    kubectl::configuration_reaches_containers_as_files_and_environment,
    streams::port_forward_reaches_a_pod_and_a_service,
    streams::cp_copies_files_and_folders_both_ways,
    streams::attach_gives_a_container_its_input_until_it_ends,
    streams::proxies_lead_to_pods_services_and_nodes,
    streams::debug_adds_a_container_that_sees_the_others_processes,
    streams::logs_come_as_their_options_ask,
    streams::a_terminal_knows_its_size_and_its_programs_exit_code,
    changes::explain_tells_fields_with_their_meaning,
    changes::patches_of_three_types_and_a_diff,
    changes::edit_saves_what_the_editor_leaves,
    changes::apply_on_the_server_side_keeps_each_managers_fields,
    changes::a_rollout_is_watched_paused_and_undone,
    changes::drain_empties_a_node_and_uncordon_opens_it,
    changes::questions_about_access_and_metrics_are_answered,
    changes::a_running_pod_is_resized_in_place,
    access::a_kubelet_lets_nobody_in_without_the_right "nodes",
    helm::a_chart_with_hooks_lives_through_its_releases,
    wrong_input::an_unknown_field_is_refused_by_name,
    wrong_input::a_selector_that_misses_its_template_is_refused,
    wrong_input::a_second_up_of_the_same_name_is_refused "nodes",
    wrong_input::up_without_root_is_refused_and_makes_nothing "nodes",
    wrong_input::a_broken_cni_call_gets_an_error_of_the_specification "nodes",
    rollout::scaling_deleting_and_restarting_lose_no_request,
    names::a_rollout_of_the_dns_loses_no_query,
    names::while_a_nodes_own_server_is_away_another_one_answers_its_pods "nodes",
    rollout::an_upgrade_of_the_agent_loses_no_request,
    faults::a_killed_agent_is_replaced_while_traffic_goes_on "nodes",
    faults::a_killed_control_plane_keeps_traffic_and_every_answered_write "nodes",
    away::pods_resolve_names_while_the_api_server_is_away "nodes",
    services::either_hook_alone_carries_all_traffic "nodes",
];

#[test]
fn a_cluster_serves_its_users() {
    // Others may run the suite on this machine too.
    let name = format!("e2e-{}", std::process::id());
    let before = MachineState::of(&name);
    let Some(cluster) = Cluster::obtain(&name, &["--nodes", "3"]) else {
        return;
    };
    let own = cluster.is_own();
    let only = std::env::var("KEELWAY_E2E_ONLY").unwrap_or_default();
    let wanted = |name: &str| only.split(',').any(|part| name.contains(part));
    let mut failed = Vec::new();
    for (index, scenario) in SCENARIOS.iter().enumerate() {
        // The first one makes what the others look at.
        if index > 0 && !wanted(scenario.name) {
            continue;
        }
        if scenario.needs_nodes && !cluster.is_here() {
            println!(
                "skipped  {}: the cluster's nodes are not on this machine",
                scenario.name
            );
            continue;
        }
        let started = Instant::now();
        // The next scenario starts from the cluster, not from what this one held in memory.
        let outcome = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&cluster)));
        let verdict = if outcome.is_ok() {
            "ok      "
        } else {
            "FAILED  "
        };
        println!(
            "{verdict} {} ({:.1} s)",
            scenario.name,
            started.elapsed().as_secs_f64()
        );
        if outcome.is_err() {
            failed.push(scenario.name);
            println!(
                "{}",
                cluster
                    .kubectl(&["get", "pods,nodes", "-A", "-o", "wide"])
                    .stdout
            );
        }
    }
    drop(cluster);
    if own && let Some(difference) = before.difference(&MachineState::of(&name)) {
        println!("FAILED   down_leaves_the_machine_as_it_was\n{difference}");
        failed.push("down_leaves_the_machine_as_it_was");
    }
    assert!(failed.is_empty(), "failed: {failed:#?}");
}
