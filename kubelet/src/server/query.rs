//! query: what stands behind the question mark of a request.

use super::ServeError;

/// Query is the query of a request, decoded, with keys that may repeat.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(k, v)| (decode(k), decode(v)))
                .collect(),
        )
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
            .filter(|v| !v.is_empty())
    }

    pub fn all(&self, key: &str) -> Vec<String> {
        self.0
            .iter()
            .filter(|(k, _)| k == key)
            .map(|(_, v)| v.clone())
            .collect()
    }

    pub fn flag(&self, keys: &[&str]) -> bool {
        keys.iter().any(|key| {
            matches!(
                self.get(key),
                Some("1" | "true" | "t" | "T" | "True" | "TRUE")
            )
        })
    }

    pub fn number(&self, key: &str) -> Result<Option<u64>, ServeError> {
        let bad = |_| ServeError::BadRequest(format!("{key} must be a number, zero or more"));
        self.get(key)
            .map(|value| value.parse().map_err(bad))
            .transpose()
    }
}

/// Undoes percent-encoding and plus signs of a query.
pub fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match (
            bytes[at],
            hex.and_then(|digits| u8::from_str_radix(digits, 16).ok()),
        ) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_and_keys_may_repeat() {
        let query = Query::parse("command=sh&command=-c&command=echo+a%20b%2Fc&input=1&tty=0&x");
        assert_eq!(query.all("command"), ["sh", "-c", "echo a b/c"]);
        assert!(query.flag(&["stdin", "input"]));
        assert!(!query.flag(&["tty"]));
        assert_eq!(query.number("tailLines").unwrap(), None);
        assert!(Query::parse("tailLines=-1").number("tailLines").is_err());
        assert_eq!(decode("%zz%4"), "%zz%4");
    }
}
