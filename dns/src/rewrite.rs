//! Names that are asked about under another name.

use regex::Regex;

use crate::name::Name;

/// A rule of `rewrite name`.
#[derive(Clone, Debug)]
pub struct Rewrite {
    pub from: Match,
    pub to: String,
    /// Later rules see the new name too.
    pub goes_on: bool,
}

/// Which names a rule is about.
#[derive(Clone, Debug)]
pub enum Match {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Substring(String),
    Regex(Regex),
}

impl PartialEq for Rewrite {
    fn eq(&self, other: &Self) -> bool {
        // Regular expressions are equal when they read alike.
        format!("{self:?}") == format!("{other:?}")
    }
}

impl Rewrite {
    /// The new name of `name`, which is in lower case and ends in a dot; `None` when the rule is not about it.
    fn apply(&self, name: &str) -> Option<String> {
        match &self.from {
            Match::Exact(from) => (name == from).then(|| self.to.clone()),
            Match::Prefix(from) => {
                Some(format!("{}{}", self.to, name.strip_prefix(from.as_str())?))
            }
            Match::Suffix(from) => {
                Some(format!("{}{}", name.strip_suffix(from.as_str())?, self.to))
            }
            Match::Substring(from) => name
                .contains(from.as_str())
                .then(|| name.replace(from.as_str(), &self.to)),
            Match::Regex(from) => {
                let found = from.captures(name)?;
                let mut text = self.to.clone();
                // CoreDNS writes groups as {1}.
                for (i, group) in found.iter().enumerate() {
                    text = text.replace(
                        &format!("{{{i}}}"),
                        group.map_or("", |group| group.as_str()),
                    );
                }
                Some(text)
            }
        }
    }
}

/// What a name is called once every rule had its say; `None` when none is about it, or what comes out is no name.
pub fn rewrite(rules: &[Rewrite], name: &Name) -> Option<Name> {
    let before = name.to_string();
    let mut text = before.clone();
    for rule in rules {
        if let Some(new) = rule.apply(&text) {
            text = if new.ends_with('.') {
                new
            } else {
                format!("{new}.")
            };
            if !rule.goes_on {
                break;
            }
        }
    }
    (text != before).then(|| Name::parse(&text).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(from: Match, to: &str) -> Rewrite {
        Rewrite {
            from,
            to: to.into(),
            goes_on: false,
        }
    }

    fn rewritten(rules: &[Rewrite], name: &str) -> Option<String> {
        rewrite(rules, &Name::parse(name).expect("a name")).map(|name| name.to_string())
    }

    #[test]
    fn each_kind_of_rule_changes_the_names_it_is_about() {
        let regex = Regex::new(r"^(.*)\.db\.(.*)\.corp\.$").expect("an expression");
        let cases = [
            (
                Match::Exact("a.example.".into()),
                "b.example.",
                "a.example",
                Some("b.example."),
            ),
            (
                Match::Prefix("old-".into()),
                "new-",
                "old-a.example",
                Some("new-a.example."),
            ),
            (
                Match::Suffix(".corp.".into()),
                ".svc.cluster.local.",
                "db.prod.corp",
                Some("db.prod.svc.cluster.local."),
            ),
            (
                Match::Substring("prod".into()),
                "test",
                "a.prod.example",
                Some("a.test.example."),
            ),
            (
                Match::Regex(regex),
                "{1}.{2}.svc.cluster.local",
                "x.db.ns.corp",
                Some("x.ns.svc.cluster.local."),
            ),
            (
                Match::Exact("a.example.".into()),
                "b.example.",
                "c.example",
                None,
            ),
        ];
        for (from, to, name, expected) in cases {
            let rules = [rule(from, to)];
            assert_eq!(rewritten(&rules, name).as_deref(), expected, "{rules:?}");
        }
    }

    #[test]
    fn the_first_rule_ends_it_unless_it_says_otherwise() {
        let mut rules = [
            rule(Match::Exact("a.".into()), "b."),
            rule(Match::Exact("b.".into()), "c."),
        ];
        assert_eq!(rewritten(&rules, "a").as_deref(), Some("b."));
        rules[0].goes_on = true;
        assert_eq!(rewritten(&rules, "a").as_deref(), Some("c."));
    }
}
