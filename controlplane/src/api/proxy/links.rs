//! Links of what is proxied: an absolute path of the other side becomes one below the proxy's own, in `Location` and in HTML.
//!
//! HTML is not parsed into a tree: start tags are found, the values of attributes that hold addresses are replaced, and every
//! other byte stays as it is.

use http::Uri;

/// Elements and their attributes that hold one address (HTML 4.01 and 5).
const ADDRESSES: &[(&str, &[&str])] = &[
    ("a", &["href"]),
    ("applet", &["codebase"]),
    ("area", &["href"]),
    ("audio", &["src"]),
    ("base", &["href"]),
    ("blockquote", &["cite"]),
    ("body", &["background"]),
    ("button", &["formaction"]),
    ("del", &["cite"]),
    ("embed", &["src"]),
    ("form", &["action"]),
    ("frame", &["longdesc", "src"]),
    ("head", &["profile"]),
    ("html", &["manifest"]),
    ("iframe", &["longdesc", "src"]),
    ("img", &["longdesc", "src", "usemap"]),
    ("input", &["src", "formaction", "usemap"]),
    ("ins", &["cite"]),
    ("link", &["href"]),
    ("object", &["classid", "codebase", "data", "usemap"]),
    ("q", &["cite"]),
    ("script", &["src"]),
    ("source", &["src"]),
    ("video", &["poster", "src"]),
];

/// Elements whose contents are text, whatever it looks like.
const TEXT: &[&str] = &["script", "style", "textarea", "title"];

/// Links are rewritten for one request.
#[derive(Debug, Clone)]
pub struct Links {
    /// The path of the proxy, without a last slash.
    pub prefix: String,
    /// What the client calls this server; addresses with another authority are left alone.
    pub authority: String,
}

impl Links {
    /// The address below the proxy; None when it stays as it is.
    pub fn below(&self, address: &str) -> Option<String> {
        let location: Uri = address.parse().ok()?;
        let own = match location.authority() {
            None => true,
            Some(named) => named.as_str() == self.authority,
        };
        // The URI type leaves out fragments.
        let path = match location.authority() {
            None => address,
            Some(named) => address.split_once(named.as_str())?.1,
        };
        let led = !own || !path.starts_with('/') || path.starts_with("//");
        if led || path.starts_with(&self.prefix) {
            return None;
        }
        Some(format!("{}{path}", self.prefix))
    }

    /// A page with its links led through the proxy.
    pub fn rewrite(&self, page: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(page.len() + page.len() / 16);
        let mut rest = page;
        while let Some(at) = rest.iter().position(|byte| *byte == b'<') {
            out.extend_from_slice(&rest[..at]);
            rest = &rest[at..];
            let taken = if rest.get(1).is_some_and(u8::is_ascii_alphabetic) {
                self.tag(rest, &mut out)
            } else {
                let taken = match rest.starts_with(b"<!--") {
                    true => end_of(rest, b"-->"),
                    false => 1,
                };
                out.extend_from_slice(&rest[..taken]);
                taken
            };
            rest = &rest[taken..];
        }
        out.extend_from_slice(rest);
        out
    }

    /// Writes a start tag, and the text of an element that has only text; how many bytes that were.
    fn tag(&self, page: &[u8], out: &mut Vec<u8>) -> usize {
        let name_end = 1 + span(&page[1..], |byte| {
            !(byte.is_ascii_whitespace() || matches!(byte, b'/' | b'>'))
        });
        let element = String::from_utf8_lossy(&page[1..name_end]).to_ascii_lowercase();
        let known = ADDRESSES.iter().find(|(name, _)| *name == element);
        let attributes = known.map_or(&[][..], |(_, attributes)| attributes);
        out.extend_from_slice(&page[..name_end]);
        let mut at = name_end;
        while at < page.len() && page[at] != b'>' {
            let gap = span(&page[at..], |byte| {
                byte.is_ascii_whitespace() || byte == b'/'
            });
            out.extend_from_slice(&page[at..at + gap]);
            at += gap;
            let name = span(&page[at..], |byte| {
                !(byte.is_ascii_whitespace() || matches!(byte, b'/' | b'>' | b'='))
            });
            // A lone "=" is taken as the first letter of a name, as browsers do.
            let name = name.max(usize::from(page.get(at) == Some(&b'=')));
            let attribute = String::from_utf8_lossy(&page[at..at + name]).to_ascii_lowercase();
            out.extend_from_slice(&page[at..at + name]);
            at += name;
            let blank = span(&page[at..], |byte| byte.is_ascii_whitespace());
            if page.get(at + blank) != Some(&b'=') {
                continue;
            }
            let equals =
                blank + 1 + span(&page[at + blank + 1..], |byte| byte.is_ascii_whitespace());
            out.extend_from_slice(&page[at..at + equals]);
            at += equals;
            let (value, whole) = value(&page[at..]);
            let text = std::str::from_utf8(value).ok();
            let wanted = text.filter(|_| attributes.contains(&attribute.as_str()));
            match wanted.and_then(|text| self.below(text.trim())) {
                Some(below) => {
                    let quote = page[at];
                    let quoted = matches!(quote, b'"' | b'\'');
                    out.extend(quoted.then_some(quote));
                    out.extend_from_slice(below.as_bytes());
                    out.extend(quoted.then_some(quote));
                }
                None => out.extend_from_slice(&page[at..at + whole]),
            }
            at += whole;
        }
        if TEXT.contains(&element.as_str()) {
            let end = closing(&page[at..], &element);
            out.extend_from_slice(&page[at..at + end]);
            at += end;
        }
        at
    }
}

/// How many of the first bytes are of a kind.
fn span(bytes: &[u8], of_kind: impl Fn(u8) -> bool) -> usize {
    bytes
        .iter()
        .position(|byte| !of_kind(*byte))
        .unwrap_or(bytes.len())
}

/// Where the bytes end that lead up to and include `mark`.
fn end_of(bytes: &[u8], mark: &[u8]) -> usize {
    let found = bytes.windows(mark.len()).position(|window| window == mark);
    found.map_or(bytes.len(), |at| at + mark.len())
}

/// Where the end tag of an element begins.
fn closing(bytes: &[u8], element: &str) -> usize {
    let mark = format!("</{element}");
    let mut windows = bytes.windows(mark.len());
    windows
        .position(|window| window.eq_ignore_ascii_case(mark.as_bytes()))
        .unwrap_or(bytes.len())
}

/// The value of an attribute, and how many bytes it takes with its quotes.
fn value(bytes: &[u8]) -> (&[u8], usize) {
    match bytes.first() {
        Some(quote @ (b'"' | b'\'')) => {
            let length = span(&bytes[1..], |byte| byte != *quote);
            (&bytes[1..1 + length], (length + 2).min(bytes.len()))
        }
        _ => {
            let length = span(bytes, |byte| !(byte.is_ascii_whitespace() || byte == b'>'));
            (&bytes[..length], length)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn links() -> Links {
        Links {
            prefix: "/api/v1/namespaces/a/services/web/proxy".to_owned(),
            authority: "api:6443".to_owned(),
        }
    }

    #[test]
    fn absolute_paths_of_the_other_side_lead_below_the_proxy() {
        let below = |address: &str| links().below(address);
        let proxy = |path: &str| Some(format!("/api/v1/namespaces/a/services/web/proxy{path}"));
        assert_eq!(below("/login?x=1"), proxy("/login?x=1"));
        assert_eq!(below("http://api:6443/a/"), proxy("/a/"));
        for left_alone in [
            "https://elsewhere/a",
            "//elsewhere/a",
            "next",
            "#part",
            "",
            "mailto:a@b",
            "/api/v1/namespaces/a/services/web/proxy/x",
        ] {
            assert_eq!(below(left_alone), None, "{left_alone}");
        }
    }

    #[test]
    fn links_of_a_page_are_rewritten_and_nothing_else() {
        let p = "/api/v1/namespaces/a/services/web/proxy";
        for (page, expected) in [
            (
                r#"<a href="/rewriteme">test</a>"#,
                format!(r#"<a href="{p}/rewriteme">test</a>"#),
            ),
            ("<A  HREF = '/x' id=y>", format!("<A  HREF = '{p}/x' id=y>")),
            (
                "<img src=/x.png alt=/x.png/><p>",
                format!("<img src={p}/x.png alt=/x.png/><p>"),
            ),
            (
                "<p href=\"/x\"> a < b <!-- <a href=\"/x\"> --> c",
                "<p href=\"/x\"> a < b <!-- <a href=\"/x\"> --> c".to_owned(),
            ),
            (
                "<script src=\"/s\">'<a href=\"/x\">'</script><a href=\"/y\">",
                format!("<script src=\"{p}/s\">'<a href=\"/x\">'</script><a href=\"{p}/y\">"),
            ),
            (
                "<a disabled href=\"/x\"",
                format!("<a disabled href=\"{p}/x\""),
            ),
            ("<a href", "<a href".to_owned()),
            ("<a href=", "<a href=".to_owned()),
            ("<a href=\"/x", format!("<a href=\"{p}/x\"")),
        ] {
            let rewritten = links().rewrite(page.as_bytes());
            assert_eq!(String::from_utf8_lossy(&rewritten), expected, "{page}");
        }
    }

    proptest! {
        #[test]
        fn pages_without_addresses_stay_as_they_are(page in "[a-z<>!='\" /-]{0,80}") {
            let none = Links { prefix: "/".to_owned(), authority: "api".to_owned() };
            // Every absolute path is below "/" already, so nothing is to be changed.
            prop_assert_eq!(none.rewrite(page.as_bytes()), page.as_bytes());
        }

        #[test]
        fn any_bytes_are_taken(page in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(links().rewrite(&page).len() >= page.len());
        }
    }
}
