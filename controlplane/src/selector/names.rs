//! What keys and values of labels look like, and what is wrong with others, in upstream's words.

/// The longest value, and the longest name of a key.
const NAME_BYTES_MAX: usize = 63;
const PREFIX_BYTES_MAX: usize = 253;

const VALUE_RULE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const NAME_RULE: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";

/// What is wrong with `[prefix/]name`, as keys of labels and annotations have it.
pub fn key_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut parts = text.split('/');
    let name = match (parts.next(), parts.next(), parts.next()) {
        (Some(name), None, _) => name,
        (Some(prefix), Some(name), None) => {
            if prefix.is_empty() {
                faults.push("prefix part must be non-empty".to_owned());
            } else {
                let why = subdomain_faults(prefix).into_iter();
                faults.extend(why.map(|why| format!("prefix part {why}")));
            }
            name
        }
        _ => {
            return vec![format!(
                "a valid label key {NAME_RULE} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        faults.push("name part must be non-empty".to_owned());
    } else if name.len() > NAME_BYTES_MAX {
        faults.push(format!(
            "name part must be no more than {NAME_BYTES_MAX} bytes"
        ));
    }
    if !is_name(name) {
        faults.push(format!("name part {NAME_RULE}"));
    }
    faults
}

/// What is wrong with the value of a label.
pub fn value_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > NAME_BYTES_MAX {
        faults.push(format!("must be no more than {NAME_BYTES_MAX} bytes"));
    }
    if !text.is_empty() && !is_name(text) {
        faults.push(VALUE_RULE.to_owned());
    }
    faults
}

/// What is wrong with the prefix of a key.
fn subdomain_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > PREFIX_BYTES_MAX {
        faults.push(format!("must be no more than {PREFIX_BYTES_MAX} bytes"));
    }
    if !text.split('.').all(is_dns_label) {
        faults.push(SUBDOMAIN_RULE.to_owned());
    }
    faults
}

/// Whether a text has the letters of an RFC 1123 label.
fn is_dns_label(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.bytes().all(|byte| plain(byte) || byte == b'-')
        && text.bytes().next().is_some_and(plain)
        && text.bytes().last().is_some_and(plain)
}

fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric();
    text.bytes()
        .all(|byte| plain(byte) || b"-_.".contains(&byte))
        && text.bytes().next().is_some_and(plain)
        && text.bytes().last().is_some_and(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_of_a_key_or_value_is_told() {
        assert!(key_faults("example.com/My_Name.1").is_empty());
        for (key, faults) in [
            ("", 2),
            ("/a", 1),
            ("a/", 2),
            ("Ex/a", 1),
            ("a b", 1),
            ("-a", 1),
            ("a/b/c", 1),
        ] {
            assert_eq!(key_faults(key).len(), faults, "{key}");
        }
        assert_eq!(
            key_faults(&"a".repeat(64)),
            ["name part must be no more than 63 bytes"]
        );
        assert!(value_faults("").is_empty() && value_faults("a_b.c").is_empty());
        assert_eq!(value_faults(&"-".repeat(64)).len(), 2);
    }
}
