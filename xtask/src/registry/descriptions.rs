//! `cargo xtask generate-descriptions --from DIR`: what `kubectl explain` says about kinds and fields, from the schemas
//! that the k8s-openapi package carries in its source (DIR is its `src/v1_36`). The output is one compressed file, which is
//! checked in.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::{Compression, GzBuilder};

/// The descriptions of one type: its own, and those of its fields.
#[derive(Debug, Default, PartialEq)]
struct Description {
    own: String,
    fields: BTreeMap<String, String>,
}

/// Reads all types of the folder and writes `to`: a line per type (`name`, tab, text), then a line per field (tab,
/// `name`, tab, text), with `\n` and `\\` for line breaks and backslashes.
pub fn generate(from: &Path, to: &Path) -> Result<()> {
    let mut types = BTreeMap::new();
    for path in sources(from)? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if let Some((name, description)) = parse(&text) {
            types.insert(name, description);
        }
    }
    if types.is_empty() {
        bail!(
            "{} holds no schemas: it should be src/v1_36 of k8s-openapi",
            from.display()
        );
    }
    let mut out = String::new();
    for (name, description) in &types {
        out += &format!("{name}\t{}\n", escaped(&description.own));
        for (field, text) in &description.fields {
            out += &format!("\t{field}\t{}\n", escaped(text));
        }
    }
    let file = fs::File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    // Without a time, the same input makes the same file.
    let mut file = GzBuilder::new().mtime(0).write(file, Compression::best());
    file.write_all(out.as_bytes())?;
    file.finish()?;
    println!(
        "{} types, {} bytes of text -> {}",
        types.len(),
        out.len(),
        to.display()
    );
    Ok(())
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(found)
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('\n', "\\n")
        .replace('\t', " ")
}

/// The schema of a source file, told by its indentation: the type's description at 12, properties at 16, theirs at 20.
fn parse(source: &str) -> Option<(String, Description)> {
    let mut lines = source.lines();
    lines.find(|line| line.contains("fn schema_name()"))?;
    let name = lines.next()?.trim().strip_prefix('"')?;
    let name = name.strip_suffix(r#"".into()"#)?.to_owned();
    let mut description = Description::default();
    let mut field = None;
    for line in lines {
        let text = line.trim_start();
        match line.len() - text.len() {
            12 => {
                if let Some(own) = described(text) {
                    description.own = own;
                }
            }
            16 => {
                // A field of another type is an expression in parentheses.
                let name = text
                    .strip_suffix("\": {")
                    .or_else(|| text.strip_suffix("\": ({"));
                field = name.and_then(|name| name.strip_prefix('"'));
            }
            20 => {
                if let (Some(field), Some(text)) = (field, described(text)) {
                    description.fields.insert(field.to_owned(), text);
                }
            }
            _ => {}
        }
    }
    Some((name, description))
}

/// The text of a line that says a description, a Rust string literal.
fn described(line: &str) -> Option<String> {
    const OTHER: &str = r#"schema_obj.ensure_object().insert("description".into(), ""#;
    let plain = line
        .strip_prefix(r#""description": ""#)
        .and_then(|rest| rest.strip_suffix("\","));
    let other = || line.strip_prefix(OTHER)?.strip_suffix("\".into());");
    let literal = plain.or_else(other)?;
    let mut out = String::with_capacity(literal.len());
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next()? {
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'u' => {
                let digits: String = chars.by_ref().skip(1).take_while(|c| *c != '}').collect();
                out.push(char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?);
            }
            plain => out.push(plain),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_read_from_its_source() {
        let source = r#"
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "io.k8s.api.core.v1.Thing".into()
    }

    fn json_schema(__gen: &mut Generator) -> Schema {
        json_schema!({
            "description": "A \"thing\".\n\nMore.",
            "properties": {
                "description": {
                    "description": "says what it is",
                },
                "plain": {
                    "type": "string",
                },
                "other": ({
                    let mut schema_obj = __gen.subschema_for::<Other>();
                    schema_obj.ensure_object().insert("description".into(), "of another type".into());
                    schema_obj
                }),
            },
        })
    }
"#;
        let (name, description) = parse(source).expect("a schema");
        assert_eq!(name, "io.k8s.api.core.v1.Thing");
        assert_eq!(description.own, "A \"thing\".\n\nMore.");
        assert_eq!(
            description.fields,
            BTreeMap::from([
                ("description".to_owned(), "says what it is".to_owned()),
                ("other".to_owned(), "of another type".to_owned()),
            ])
        );
        assert_eq!(parse("pub mod thing;"), None);
    }
}
