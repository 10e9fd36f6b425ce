//! What is wrong with a document, in the words of the parsers that users know from Kubernetes.

/// What of a body a message shows.
const SHOWN_BYTES_MAX: usize = 30;

/// Why a body is no JSON: most faults as Go's parser names them.
pub fn json_fault(body: &[u8], error: &serde_json::Error) -> String {
    if error.is_eof() {
        return "unexpected end of JSON input".to_owned();
    }
    let said = error.to_string();
    let place = [
        ("trailing characters", "after top-level value"),
        ("expected value", "looking for beginning of value"),
        ("trailing comma", "looking for beginning of value"),
        (
            "key must be a string",
            "looking for beginning of object key string",
        ),
        ("expected `,` or `}`", "after object key:value pair"),
        ("expected `,` or `]`", "after array element"),
        ("expected `:`", "after object key"),
        ("control character", "in string literal"),
        ("invalid escape", "in string escape code"),
    ];
    if said.starts_with("recursion limit") {
        return super::TOO_DEEP.to_owned();
    }
    match place.iter().find(|(known, _)| said.starts_with(known)) {
        Some((_, place)) => format!("invalid character {:?} {place}", character(body, error)),
        None => said,
    }
}

/// The character at which the parser stopped.
fn character(body: &[u8], error: &serde_json::Error) -> char {
    let before = error.line().saturating_sub(1);
    let line = body.split(|byte| *byte == b'\n').nth(before).unwrap_or(&[]);
    let at = error.column().saturating_sub(1).min(line.len());
    let text = String::from_utf8_lossy(&line[at..]);
    text.chars().next().unwrap_or('\n')
}

/// Why a body is no YAML, in one line: the parser shows the place in several.
pub fn yaml_fault(said: &str) -> String {
    let first = said.lines().next().unwrap_or("");
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let place = first.strip_prefix("line ").and_then(|rest| {
        let (line, rest) = rest.split_once(' ')?;
        let (_, why) = rest.split_once(": ")?;
        Some(format!("yaml: line {line}: {why}"))
    });
    place.unwrap_or_else(|| format!("yaml: {first}"))
}

/// The message for a body of which not even the kind can be told.
pub fn unrecognized(body: &[u8], kind: &str, why: &str) -> String {
    format!(
        "the object provided is unrecognized (must be of type {kind}): {why} ({})",
        summary(body)
    )
}

/// The message for JSON that is no object: the parser looks for the kind first.
pub fn no_object(found: &str) -> String {
    format!(
        "couldn't get version/kind; json parse error: json: cannot unmarshal {found} into Go value of type struct {{ \
         APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }}"
    )
}

/// A body in few bytes: an object as it begins, anything else in hexadecimal digits.
fn summary(body: &[u8]) -> String {
    let (shown, more) = match body.split_at_checked(SHOWN_BYTES_MAX) {
        Some((shown, rest)) if !rest.is_empty() => (shown, " ..."),
        _ => (body, ""),
    };
    match shown.first() {
        None => "<empty>".to_owned(),
        Some(b'{') => format!("{}{more}", String::from_utf8_lossy(shown)),
        Some(_) => {
            let digits: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{digits}{more}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_named_as_users_know_them() {
        for (body, expected) in [
            ("", "unexpected end of JSON input"),
            (r#"{"a":"#, "unexpected end of JSON input"),
            (
                r#"{"a":1} x"#,
                "invalid character 'x' after top-level value",
            ),
            (
                "abc: d",
                "invalid character 'a' looking for beginning of value",
            ),
            (
                "{a:1}",
                "invalid character 'a' looking for beginning of object key string",
            ),
            (
                r#"{"a":1 "b"}"#,
                "invalid character '\"' after object key:value pair",
            ),
            ("[1 2]", "invalid character '2' after array element"),
            (r#"{"a" 1}"#, "invalid character '1' after object key"),
        ] {
            let error = serde_json::from_str::<serde_json::Value>(body).expect_err("no JSON");
            assert_eq!(json_fault(body.as_bytes(), &error), expected, "{body}");
        }
    }

    #[test]
    fn faults_of_yaml_are_one_line() {
        let said = "error: line 2 column 4: unclosed bracket '['\n --> <input>:2:4\n  |";
        assert_eq!(yaml_fault(said), "yaml: line 2: unclosed bracket '['");
        assert_eq!(yaml_fault("odd"), "yaml: odd");
    }

    #[test]
    fn a_body_is_summed_up() {
        assert_eq!(summary(b""), "<empty>");
        assert_eq!(summary(b"[1]"), "5b315d");
        assert_eq!(summary(b"{\"a\":"), "{\"a\":");
        assert!(summary(&[b'{'; 40]).ends_with("{ ..."));
    }
}
