//! The plugins of a Corefile that change what a name means: `hosts`, `rewrite` and `autopath`.

use std::path::{Path, PathBuf};

use regex::Regex;

use super::corefile::{Directive, SyntaxError, Word, beside};
use super::plugins::{Reading, number, one};
use super::spec::{AutopathSpec, search_domains};
use crate::hosts::Hosts;
use crate::name::Name;
use crate::rewrite::{Match, Rewrite};

impl Reading<'_> {
    pub(super) fn hosts(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        let mut hosts = Hosts::new(3600);
        let mut inline = false;
        for line in &directive.lines {
            let (key, values) = (&line[0], &line[1..]);
            match key.text.as_str() {
                "ttl" => hosts.ttl_s = number(one(key, values)?)?,
                "no_reverse" => hosts.reverse = false,
                "reload" => {}
                "fallthrough" => hosts.fallthrough = self.zones_or(values, &[Name::root()])?,
                _ => {
                    let names: Vec<&str> = values.iter().map(|word| word.text.as_str()).collect();
                    hosts
                        .add(&key.text, &names)
                        .map_err(|error| key.bad(error.to_string()))?;
                    inline = true;
                }
            }
        }
        if let [_, zones @ ..] = &directive.args[..] {
            hosts.zones = self.zones(zones)?;
        }
        let file = directive.args.first().map(|word| PathBuf::from(&word.text));
        let file = file.or_else(|| (!inline).then(|| "/etc/hosts".into()));
        if let Some(file) = file {
            let file = beside(self.path, &file);
            let failed = |error: String| directive.name.bad(format!("{}: {error}", file.display()));
            let text = self
                .files
                .text(&file)
                .map_err(|error| failed(error.to_string()))?;
            hosts
                .add_file(&text)
                .map_err(|error| failed(error.to_string()))?;
        }
        self.block.hosts = Some(hosts);
        Ok(())
    }

    pub(super) fn rewrite(&mut self, directive: &Directive) -> Result<(), SyntaxError> {
        // The rule may be in braces, on as many lines as it likes.
        let braced = directive.lines.iter().flatten();
        let braced = braced.filter(|_| directive.args.len() < 2);
        let mut words = directive.args.iter().chain(braced).peekable();
        let goes_on = words
            .next_if(|word| matches!(word.text.as_str(), "stop" | "continue"))
            .is_some_and(|word| word.text == "continue");
        if words.next_if(|word| word.text == "name").is_none() {
            return Err(directive.name.bad("only rewrite name is supported"));
        }
        let kind = words
            .next_if(|word| {
                matches!(
                    word.text.as_str(),
                    "exact" | "prefix" | "suffix" | "substring" | "regex"
                )
            })
            .map_or("exact", |word| word.text.as_str());
        let (Some(from), Some(to)) = (words.next(), words.next()) else {
            return Err(directive.name.bad("needs FROM and TO"));
        };
        // Answers carry the name that was asked for, whatever is said of their names.
        while let Some(more) = words.next() {
            let what = words.next().map_or("", |word| word.text.as_str());
            match (more.text.as_str(), what) {
                ("answer", "auto") => {}
                ("answer", "name") => {
                    if words.next().and(words.next()).is_none() {
                        return Err(more.bad("name needs FROM and TO"));
                    }
                }
                ("answer", _) => {
                    return Err(more.bad("only answer auto and answer name are supported"));
                }
                _ => return Err(more.bad("is not known to rewrite name")),
            }
        }
        let lower = from.text.to_ascii_lowercase();
        let absolute = |text: &str| {
            if text.ends_with('.') {
                text.to_owned()
            } else {
                format!("{text}.")
            }
        };
        let to = to.text.to_ascii_lowercase();
        let (from, to) = match kind {
            "exact" => (Match::Exact(absolute(&lower)), absolute(&to)),
            "prefix" => (Match::Prefix(lower), to),
            "suffix" => (Match::Suffix(absolute(&lower)), absolute(&to)),
            "substring" => (Match::Substring(lower), to),
            _ => {
                let regex = Regex::new(&from.text).map_err(|error| from.bad(error.to_string()))?;
                (Match::Regex(regex), to)
            }
        };
        self.block.rewrites.push(Rewrite { from, to, goes_on });
        Ok(())
    }

    pub(super) fn autopath(&mut self, name: &Word, args: &[Word]) -> Result<(), SyntaxError> {
        let (from, zones) = args
            .split_last()
            .ok_or_else(|| name.bad("needs @kubernetes or a resolv.conf"))?;
        let search = if from.text == "@kubernetes" {
            // What the node's pods have after the cluster's domains comes from where this process has it from. There may be nothing.
            search_domains(self.resolv_conf, self.files).unwrap_or_default()
        } else if from.text.starts_with('@') {
            return Err(from.bad("is not @kubernetes"));
        } else {
            let file = Path::new(&from.text);
            search_domains(file, self.files).map_err(|error| from.bad(error.to_string()))?
        };
        let zones = self.zones(zones)?;
        self.block.autopath = Some(AutopathSpec { zones, search });
        Ok(())
    }
}
