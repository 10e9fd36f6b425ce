//! What `kubectl explain` says about types and fields. The texts are kept compressed and read when an OpenAPI document is
//! made, which keeps the document: they cost nothing before the first is asked for, and nothing afterwards.

use std::collections::HashMap;
use std::io::Read;

use flate2::read::GzDecoder;

/// Made by `cargo xtask generate-descriptions`: a line per type, then one per field, with `\n` and `\\` escaped.
static COMPRESSED: &[u8] = include_bytes!("generated/descriptions.gz");

/// The texts of all types and fields.
pub struct Descriptions {
    /// By type, and by type and field; the type's own is under the field "".
    texts: HashMap<(String, String), String>,
}

impl Descriptions {
    pub fn read() -> Self {
        let mut lines = String::new();
        // The file is part of the program: a broken one is found by this module's test.
        if let Err(error) = GzDecoder::new(COMPRESSED).read_to_string(&mut lines) {
            tracing::error!(%error, "the descriptions of types cannot be read");
        }
        let mut texts = HashMap::new();
        let mut of = "";
        for line in lines.lines() {
            let (field, text) = match line.strip_prefix('\t') {
                Some(rest) => match rest.split_once('\t') {
                    Some(parts) => parts,
                    None => continue,
                },
                None => {
                    let Some((name, text)) = line.split_once('\t') else {
                        continue;
                    };
                    of = name;
                    ("", text)
                }
            };
            texts.insert((of.to_owned(), field.to_owned()), unescaped(text));
        }
        Self { texts }
    }

    /// What is said about a type.
    pub fn of_type(&self, name: &str) -> Option<&str> {
        self.of_field(name, "")
    }

    /// What is said about a field of a type.
    pub fn of_field(&self, name: &str, field: &str) -> Option<&str> {
        let text = self.texts.get(&(name.to_owned(), field.to_owned()))?;
        Some(text)
            .filter(|text| !text.is_empty())
            .map(String::as_str)
    }
}

fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                Some(plain) => out.push(plain),
                None => {}
            },
            plain => out.push(plain),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Shape, resources};
    use super::*;

    #[test]
    fn every_kind_and_nearly_every_field_is_described() {
        let descriptions = Descriptions::read();
        let mut undescribed = Vec::new();
        for resource in resources()
            .iter()
            .filter(|resource| resource.version == "v1")
        {
            let ty = resource.ty.get();
            assert!(descriptions.of_type(ty.name).is_some(), "{}", ty.name);
            let spec = ty.field("spec").and_then(|spec| spec.ty.target());
            let fields = spec.filter(|spec| spec.shape == Shape::Struct);
            for (ty, field) in fields
                .iter()
                .flat_map(|ty| ty.fields.iter().map(move |f| (ty, f)))
            {
                if descriptions.of_field(ty.name, field.name).is_none() {
                    undescribed.push(format!("{}.{}", ty.name, field.name));
                }
            }
        }
        assert!(undescribed.is_empty(), "{undescribed:#?}");
        let text = descriptions.of_field("io.k8s.api.core.v1.HostPathVolumeSource", "type");
        assert!(
            text.is_some_and(|text| text.contains("Defaults to \"\"")),
            "{text:?}"
        );
    }
}
