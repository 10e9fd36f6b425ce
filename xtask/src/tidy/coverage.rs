//! docs/coverage.md names tests; they must be there.

use std::path::Path;

/// What is in backquotes, pairwise.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Tests and rows of the packet table that the document names and no source has. `sources` are paths with their texts.
pub fn faults(document: &str, sources: &[(&Path, &str)]) -> Vec<String> {
    let is_named = |path: &Path, module: &str| {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let folder = path.parent().and_then(Path::file_name);
        stem == Some(module) || (stem == Some("mod") && folder.is_some_and(|name| name == module))
    };
    quoted(document)
        .filter(|name| {
            if let Some(row) = name.strip_prefix("table: ") {
                let line = format!("name: \"{row}\"");
                return !sources.iter().any(|(_, text)| text.contains(&line));
            }
            let Some((module, test)) = name.split_once("::").filter(|_| !name.contains(' ')) else {
                return false;
            };
            let line = format!("fn {test}(");
            let there =
                |(path, text): &(&Path, &str)| is_named(path, module) && text.contains(&line);
            module != "file" && !sources.iter().any(there)
        })
        .map(|name| format!("docs/coverage.md names {name}, which is no test of ours"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_must_be_there() {
        let sources = [
            (Path::new("tests/tests/a.rs"), "fn it_works() {}"),
            (Path::new("tests/tests/table/mod.rs"), "fn all() {}"),
            (Path::new("tests/tests/table/rows.rs"), "name: \"a row\","),
        ];
        let document = "`file::name`, `a::it_works`, `table::all`, `table: a row`, `status`";
        assert_eq!(faults(document, &sources), Vec::<String>::new());
        let wrong = "`a::it_fails` `b::it_works` `table: another row`";
        assert_eq!(faults(wrong, &sources).len(), 3);
    }
}
