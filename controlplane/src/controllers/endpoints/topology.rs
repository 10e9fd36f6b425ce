//! Hints of Services that ask for `service.kubernetes.io/topology-mode: Auto` (KEP-2433): every zone is given as large a part of the
//! ready endpoints as it has of the cluster's processors, so nearly that no endpoint gets much more traffic than without hints.
//! Where that cannot be, there are no hints, and traffic goes everywhere.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, ForZone};

use super::super::nodes::Zones;
use super::super::object::{Key, Target};
use super::super::plan::Note;
use super::super::snapshot::Snapshot;
use super::desired::{Shape, families};
use super::reconcile::identity;

const MODE: &str = "service.kubernetes.io/topology-mode";
/// Its older name, which counts first.
const OLD_MODE: &str = "service.kubernetes.io/topology-aware-hints";
/// By how much more traffic an endpoint may get than without hints.
const OVERLOAD_MAX: f64 = 0.2;
const REPORTER: &str = "endpoint-slice-controller";

pub fn is_shared_out(service: &Service) -> bool {
    let annotations = service.metadata.annotations.as_ref();
    let of = |name| annotations.and_then(|annotations| annotations.get(name));
    let mode = of(OLD_MODE).or_else(|| of(MODE));
    mode.is_some_and(|mode| mode == "Auto" || mode == "auto")
}

/// Gives the ready endpoints of each address family their hints, and what there is to say about it.
pub fn share_out(
    snapshot: &Snapshot,
    service: &Service,
    groups: &mut BTreeMap<Shape, Vec<Endpoint>>,
) -> Vec<Note> {
    let hints = present_hints(snapshot, service);
    let of = |endpoint: &Endpoint| hints.get(&identity(endpoint)).copied();
    let mut notes = Vec::new();
    for family in families(service) {
        let of_family = |(shape, _): &(&Shape, _)| shape.address_type == family;
        let all = groups.iter_mut().filter(of_family);
        let mut ready: Vec<&mut Endpoint> = all
            .flat_map(|(_, endpoints)| endpoints)
            .filter(|endpoint| is_ready(endpoint))
            .collect();
        ready.sort_by(|one, other| one.addresses.cmp(&other.addresses));
        let shared = zones(snapshot.zones(), ready.len()).and_then(|zones| {
            let home = |one: &&mut Endpoint| one.zone.clone().filter(|zone| !zone.is_empty());
            let homes: Option<Vec<String>> = ready.iter().map(home).collect();
            let homes = homes.ok_or("One or more endpoints do not have a zone specified")?;
            Ok((zones, homes))
        });
        let say = |type_, reason, message: &str| Note {
            type_,
            ..Note::normal(
                &Target::of(service),
                REPORTER,
                reason,
                format!("{message}, addressType: {family}"),
            )
        };
        let (zones, homes) = match shared {
            Ok(shared) => shared,
            Err(why) => {
                notes.push(say("Warning", "TopologyAwareHintsDisabled", &why));
                continue;
            }
        };
        let before: Vec<Option<&str>> = ready.iter().map(|endpoint| of(endpoint)).collect();
        if before.iter().all(Option::is_none) {
            let message = "Topology Aware Hints has been enabled";
            notes.push(say("Normal", "TopologyAwareHintsEnabled", message));
        }
        let chosen = assign(&zones, &homes, &before);
        for (endpoint, zone) in ready.into_iter().zip(chosen) {
            endpoint.hints = Some(EndpointHints {
                for_zones: Some(vec![ForZone {
                    name: zones[zone].name.to_owned(),
                }]),
                for_nodes: None,
            });
        }
    }
    notes
}

fn is_ready(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    conditions.and_then(|conditions| conditions.ready) == Some(true)
}

/// For which zone endpoints are by now.
fn present_hints<'a>(
    snapshot: &'a Snapshot,
    service: &Service,
) -> HashMap<(String, String), &'a str> {
    let slices = snapshot.slices_of_service(&Key::of(&service.metadata));
    slices
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .filter_map(|endpoint| {
            let zones = endpoint.hints.as_ref()?.for_zones.as_deref()?;
            match zones {
                [zone] => Some((identity(endpoint), zone.name.as_str())),
                _ => None,
            }
        })
        .collect()
}

/// Zone is what one zone should have of the endpoints.
#[derive(Debug)]
struct Zone<'a> {
    name: &'a str,
    /// With fewer, each of them would be overloaded.
    least: usize,
    /// Its part, as it comes out.
    wanted: f64,
}

/// What each zone should have of so many endpoints, or why they cannot be shared out. The words are upstream's.
fn zones(zones: &Zones, endpoints: usize) -> Result<Vec<Zone<'_>>, String> {
    let shares = zones.shares().ok_or(
        "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes",
    )?;
    if shares.len() < 2 {
        return Err("Nodes only ready in one zone".to_owned());
    }
    let counts = format!("({endpoints} endpoints, {} zones)", shares.len());
    if shares.len() > endpoints {
        return Err(format!("Insufficient number of endpoints {counts}"));
    }
    let zone = |(name, share): (_, f64)| {
        let part = share * endpoints as f64;
        let least = (part * (1.0 / (1.0 + OVERLOAD_MAX))).ceil();
        Zone {
            name,
            least: least as usize,
            wanted: part.max(least),
        }
    };
    let zones: Vec<Zone<'_>> = shares.into_iter().map(zone).collect();
    if zones.iter().map(|zone| zone.least).sum::<usize>() > endpoints {
        return Err(format!(
            "Unable to allocate minimum required endpoints to each zone without exceeding overload threshold {counts}"
        ));
    }
    Ok(zones)
}

/// For which of the zones each endpoint is: for the one it was for, or its own, as far as every zone has its least by that. New
/// endpoints bring every zone near to its part. The least of all zones are no more than there are endpoints.
fn assign(zones: &[Zone<'_>], homes: &[String], before: &[Option<&str>]) -> Vec<usize> {
    let index = |name: &str| zones.iter().position(|zone| zone.name == name);
    let before: Vec<Option<usize>> = before.iter().map(|name| name.and_then(index)).collect();
    let has_new = before.iter().any(Option::is_none);
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); zones.len()];
    let mut homeless = Vec::new();
    for (endpoint, home) in homes.iter().enumerate() {
        match before[endpoint].or_else(|| index(home)) {
            Some(zone) => members[zone].push(endpoint),
            // A zone without nodes that are ready: what is there serves others.
            None => homeless.push(endpoint),
        }
    }
    let missing =
        |members: &[Vec<usize>], zone: usize| zones[zone].wanted - members[zone].len() as f64;
    for endpoint in homeless {
        let by_need = |one: &usize, other: &usize| {
            missing(&members, *one).total_cmp(&missing(&members, *other))
        };
        let neediest = (0..zones.len()).max_by(by_need).unwrap_or_default();
        members[neediest].push(endpoint);
    }
    while let Some((giver, taker)) = next_move(zones, &members, has_new) {
        // One that goes home rather than one that is at home.
        let given = &members[giver];
        let at = given
            .iter()
            .rposition(|endpoint| homes[*endpoint] == zones[taker].name)
            .or_else(|| {
                let is_away = |endpoint: &usize| homes[*endpoint] != zones[giver].name;
                given.iter().rposition(is_away)
            })
            .unwrap_or(given.len() - 1);
        let endpoint = members[giver].remove(at);
        members[taker].push(endpoint);
    }
    let mut chosen = vec![0; homes.len()];
    for (zone, members) in members.into_iter().enumerate() {
        for endpoint in members {
            chosen[endpoint] = zone;
        }
    }
    chosen
}

/// The zones between which an endpoint should move next: to one that has less than its least, or, where endpoints may move that need
/// not, when it brings both nearer to their parts and one of them by a whole endpoint.
fn next_move(
    zones: &[Zone<'_>],
    members: &[Vec<usize>],
    may_improve: bool,
) -> Option<(usize, usize)> {
    let count = |zone: usize| members[zone].len();
    let missing = |zone: usize| zones[zone].wanted - count(zone) as f64;
    let is_short = |zone: &usize| count(*zone) < zones[*zone].least;
    let all = 0..zones.len();
    let any_short = all.clone().any(|zone| is_short(&zone));
    let taker = all
        .clone()
        .filter(|zone| !any_short || is_short(zone))
        .max_by(|one, other| missing(*one).total_cmp(&missing(*other)))?;
    let giver = all
        .filter(|zone| count(*zone) > zones[*zone].least)
        .min_by(|one, other| missing(*one).total_cmp(&missing(*other)))?;
    let (gives, takes) = (-missing(giver), missing(taker));
    let improves = gives.min(takes) >= 0.5 && gives.max(takes) >= 1.0;
    (any_short || (may_improve && improves)).then_some((giver, taker))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    /// Nodes' processors, by zone.
    fn cluster(processors: &[u64]) -> Zones {
        let mut zones = Zones::default();
        for (name, cpu) in NAMES.iter().zip(processors) {
            let node = serde_json::json!({
                "metadata": {"labels": {"topology.kubernetes.io/zone": name}},
                "status": {
                    "allocatable": {"cpu": cpu.to_string()},
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            });
            zones.add(&serde_json::from_value(node).unwrap());
        }
        zones
    }

    fn counts(zones: &[Zone<'_>], chosen: &[usize]) -> Vec<usize> {
        let of = |zone| chosen.iter().filter(|chosen| **chosen == zone).count();
        (0..zones.len()).map(of).collect()
    }

    fn homes(names: &str) -> Vec<String> {
        names.chars().map(String::from).collect()
    }

    #[test]
    fn zones_get_endpoints_as_they_have_processors() {
        let nodes = cluster(&[4, 2, 2]);
        let wanted = zones(&nodes, 8).unwrap();
        let homes = homes("aabbbbcz");
        let chosen = assign(&wanted, &homes, &[None; 8]);
        assert_eq!(counts(&wanted, &chosen), [4, 2, 2]);
        // Nobody at home has moved further than need be.
        assert_eq!((chosen[0], chosen[1], chosen[6]), (0, 0, 2));
    }

    #[test]
    fn what_cannot_be_shared_out_is_said() {
        let refused = |processors: &[u64], endpoints| {
            let nodes = cluster(processors);
            zones(&nodes, endpoints).unwrap_err()
        };
        assert!(refused(&[], 3).starts_with("Insufficient Node information"));
        assert_eq!(refused(&[4], 3), "Nodes only ready in one zone");
        assert_eq!(
            refused(&[4, 4, 4], 2),
            "Insufficient number of endpoints (2 endpoints, 3 zones)"
        );
        assert!(refused(&[4, 4], 3).starts_with("Unable to allocate minimum"));
    }

    proptest! {
        #[test]
        fn every_zone_has_its_least_and_what_has_been_shared_out_stays(
            processors in proptest::collection::vec(1u64..64, 2..5),
            homes in proptest::collection::vec(0usize..5, 2..200),
            before in proptest::collection::vec(proptest::option::of(0usize..5), 200),
        ) {
            let nodes = cluster(&processors);
            let Ok(wanted) = zones(&nodes, homes.len()) else {
                return Ok(());
            };
            let name = |zone: &usize| NAMES.get(*zone).copied().unwrap_or("elsewhere");
            let before: Vec<Option<&str>> =
                before[..homes.len()].iter().map(|zone| zone.as_ref().map(name)).collect();
            let homes: Vec<String> = homes.iter().map(|zone| name(zone).to_owned()).collect();
            let chosen = assign(&wanted, &homes, &before);
            for (zone, count) in wanted.iter().zip(counts(&wanted, &chosen)) {
                prop_assert!(count >= zone.least, "{zone:?} has {count}");
            }
            let after: Vec<Option<&str>> =
                chosen.iter().map(|zone| Some(wanted[*zone].name)).collect();
            prop_assert_eq!(assign(&wanted, &homes, &after), chosen);
        }
    }
}
