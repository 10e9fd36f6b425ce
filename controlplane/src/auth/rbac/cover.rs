//! Whether somebody holds all that a role would give: nobody may hand out more than they have.

use super::Rule;
use super::rule::{has, reaches};

/// Rules are taken apart into single rights; this many are looked at before the answer is no.
const RIGHTS_MAX: usize = 100_000;

/// What somebody would give away without holding it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotHeld {
    #[error("{}", render(.0))]
    Rules(Vec<Rule>),
    #[error("the rules name more than {RIGHTS_MAX} rights that are not held as a whole")]
    TooMany,
}

fn render(rules: &[Rule]) -> String {
    let lines: Vec<String> = rules.iter().map(Rule::to_string).collect();
    lines.join("\n")
}

/// Whether `held` covers all of `wanted`. A right that is spread over several held rules counts; so each wanted rule that no
/// single one covers is taken apart.
pub fn covers(held: &[Rule], wanted: &[Rule]) -> Result<(), NotHeld> {
    let mut missing = Vec::new();
    let mut looked_at = 0;
    for rule in wanted {
        if held.iter().any(|held| covers_whole(held, rule)) {
            continue;
        }
        looked_at += rights(rule);
        if looked_at > RIGHTS_MAX {
            return Err(NotHeld::TooMany);
        }
        for right in take_apart(rule) {
            if !held.iter().any(|held| covers_whole(held, &right)) && !missing.contains(&right) {
                missing.push(right);
            }
        }
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(NotHeld::Rules(missing)),
    }
}

fn covers_whole(held: &Rule, wanted: &Rule) -> bool {
    let all = |held: &[String], wanted: &[String]| wanted.iter().all(|item| has(held, item));
    let names = held.resource_names.is_empty()
        || (!wanted.resource_names.is_empty()
            && wanted
                .resource_names
                .iter()
                .all(|name| held.resource_names.contains(name)));
    let urls = wanted
        .non_resource_urls
        .iter()
        .all(|url| held.non_resource_urls.iter().any(|held| reaches(held, url)));
    let resources = wanted.resources.iter().all(|resource| {
        has(&held.resources, resource)
            || resource.split_once('/').is_some_and(|(_, subresource)| {
                held.resources
                    .iter()
                    .any(|held| held.strip_prefix("*/") == Some(subresource))
            })
    });
    all(&held.verbs, &wanted.verbs)
        && all(&held.api_groups, &wanted.api_groups)
        && resources
        && names
        && urls
}

/// How many rights a rule is taken apart into.
fn rights(rule: &Rule) -> usize {
    let resources = [
        rule.api_groups.len(),
        rule.resources.len(),
        rule.resource_names.len().max(1),
    ];
    let of_resources = resources.into_iter().fold(1, usize::saturating_mul);
    of_resources
        .saturating_add(rule.non_resource_urls.len())
        .saturating_mul(rule.verbs.len())
}

fn take_apart(rule: &Rule) -> Vec<Rule> {
    let mut rights = Vec::new();
    let one = |text: &String| vec![text.clone()];
    let names: Vec<Vec<String>> = match rule.resource_names.is_empty() {
        true => vec![Vec::new()],
        false => rule.resource_names.iter().map(one).collect(),
    };
    for verb in &rule.verbs {
        for group in &rule.api_groups {
            for resource in &rule.resources {
                for name in &names {
                    rights.push(Rule {
                        verbs: one(verb),
                        api_groups: one(group),
                        resources: one(resource),
                        resource_names: name.clone(),
                        non_resource_urls: Vec::new(),
                    });
                }
            }
        }
        for url in &rule.non_resource_urls {
            rights.push(Rule {
                verbs: one(verb),
                non_resource_urls: one(url),
                ..Rule::default()
            });
        }
    }
    rights
}
