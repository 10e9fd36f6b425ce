//! Label selectors.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub type Labels = BTreeMap<String, String>;

/// Whether the labels hold every pair.
pub fn pairs_match(pairs: &Labels, labels: Option<&Labels>) -> bool {
    pairs
        .iter()
        .all(|(name, value)| labels.and_then(|labels| labels.get(name)) == Some(value))
}

/// Whether the selector selects the labels. An empty selector selects everything; an expression with an unknown
/// operator selects nothing.
pub fn selector_matches(selector: &LabelSelector, labels: Option<&Labels>) -> bool {
    selector
        .match_labels
        .as_ref()
        .is_none_or(|pairs| pairs_match(pairs, labels))
        && selector
            .match_expressions
            .iter()
            .flatten()
            .all(|requirement| {
                let values = requirement.values.as_deref().unwrap_or_default();
                operator_matches(
                    &requirement.operator,
                    labels.and_then(|labels| labels.get(&requirement.key)),
                    values,
                )
            })
}

pub fn is_empty(selector: &LabelSelector) -> bool {
    selector
        .match_labels
        .as_ref()
        .is_none_or(BTreeMap::is_empty)
        && selector
            .match_expressions
            .as_ref()
            .is_none_or(Vec::is_empty)
}

/// One requirement of a selector on a value that may be absent. `Gt` and `Lt` occur in node selectors only.
pub fn operator_matches(operator: &str, found: Option<&String>, values: &[String]) -> bool {
    match operator {
        "In" => found.is_some_and(|found| values.contains(found)),
        "NotIn" => found.is_none_or(|found| !values.contains(found)),
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" | "Lt" => {
            let number = |text: &String| text.parse::<i64>().ok();
            match (found.and_then(number), values.first().and_then(number)) {
                (Some(found), Some(bound)) => {
                    (operator == "Gt" && found > bound) || (operator == "Lt" && found < bound)
                }
                _ => false,
            }
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;

    #[test]
    fn operators_decide_as_the_api_says() {
        let values = |list: &[&str]| {
            list.iter()
                .map(|value| value.to_string())
                .collect::<Vec<_>>()
        };
        let five = "5".to_string();
        for (operator, found, list, expected) in [
            ("In", Some(&five), vec!["4", "5"], true),
            ("In", None, vec!["5"], false),
            ("NotIn", None, vec!["5"], true),
            ("NotIn", Some(&five), vec!["5"], false),
            ("Exists", Some(&five), vec![], true),
            ("DoesNotExist", None, vec![], true),
            ("Gt", Some(&five), vec!["4"], true),
            ("Gt", Some(&five), vec!["5"], false),
            ("Lt", Some(&five), vec!["six"], false),
            ("Near", Some(&five), vec!["5"], false),
        ] {
            assert_eq!(
                operator_matches(operator, found, &values(&list)),
                expected,
                "{operator} {found:?} {list:?}"
            );
        }
    }

    #[test]
    fn a_selector_needs_pairs_and_expressions() {
        let labels: Labels = [("app".into(), "web".into())].into();
        let mut selector = LabelSelector {
            match_labels: Some(labels.clone()),
            ..Default::default()
        };
        assert!(selector_matches(&selector, Some(&labels)));
        assert!(!selector_matches(&selector, None));
        selector.match_expressions = Some(vec![LabelSelectorRequirement {
            key: "tier".into(),
            operator: "Exists".into(),
            values: None,
        }]);
        assert!(!selector_matches(&selector, Some(&labels)));
        assert!(selector_matches(&LabelSelector::default(), None));
    }
}
