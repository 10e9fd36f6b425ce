//! JSON of any shape copied as text while it is read: what protobuf holds as JSON.

use std::fmt;

use serde::de::DeserializeSeed;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The value as compact JSON.
pub fn text<'de, D: Deserializer<'de>>(json: D) -> Result<Vec<u8>, D::Error> {
    let mut out = Vec::new();
    Copy(&mut out).deserialize(json)?;
    Ok(out)
}

struct Copy<'w>(&'w mut Vec<u8>);

impl Copy<'_> {
    fn scalar<E: Error>(self, value: &(impl serde::Serialize + ?Sized)) -> Result<(), E> {
        serde_json::to_writer(self.0, value).map_err(E::custom)
    }
}

impl<'de> DeserializeSeed<'de> for Copy<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Copy<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.0.extend_from_slice(b"null");
        Ok(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.scalar(&value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.scalar(&value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.scalar(&value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.scalar(&value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.scalar(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.0.push(b'[');
        let start = self.0.len();
        loop {
            let before = self.0.len();
            if before > start {
                self.0.push(b',');
            }
            if items.next_element_seed(Copy(self.0))?.is_none() {
                self.0.truncate(before);
                break;
            }
        }
        self.0.push(b']');
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.0.push(b'{');
        let start = self.0.len();
        while let Some(key) = map.next_key::<String>()? {
            if self.0.len() > start {
                self.0.push(b',');
            }
            Copy(self.0).scalar(&key)?;
            self.0.push(b':');
            map.next_value_seed(Copy(self.0))?;
        }
        self.0.push(b'}');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_is_what_was_read() {
        for json in [
            r#"{"f:a":{".":{},"k:{\"x\":1}":[]},"n":[1,-2,1.5,null,true,"é\n"]}"#,
            "[]",
            "{}",
            "null",
            r#"[[],[{}]]"#,
        ] {
            let mut reader = serde_json::Deserializer::from_str(json);
            let copied = text(&mut reader).expect("JSON");
            assert_eq!(String::from_utf8_lossy(&copied), json);
        }
    }
}
