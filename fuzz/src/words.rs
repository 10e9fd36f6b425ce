//! What comes in queries: selectors and continue tokens; and the small notations inside documents.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::codec::{MediaType, quantity, time};
use crate::page::Continue;
use crate::selector::{FieldSelector, LabelSelector};

pub fn selectors(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let object = json!({"metadata": {"name": "a", "labels": {"app": "web", "tier": "1", "empty": ""}},
        "spec": {"nodeName": "n", "replicas": 3}});
    if let Ok(selector) = LabelSelector::parse(text) {
        let shown = selector.to_string();
        let again = LabelSelector::parse(&shown);
        let again = again.unwrap_or_else(|error| panic!("{text:?} became {shown:?}: {error}"));
        assert_eq!(
            again.matches(&object),
            selector.matches(&object),
            "{text:?}"
        );
        assert_eq!(again.to_string(), shown, "{text:?}");
    }
    if let Ok(selector) = FieldSelector::parse(text) {
        selector.matches(&object);
        for path in selector.paths() {
            selector.exact(path);
        }
    }
    if let Ok(selector) = serde_json::from_str::<Value>(text)
        && let Ok(selector) = LabelSelector::from_object(&selector)
    {
        selector.matches(&object);
    }
}

pub fn tokens(input: &[u8]) {
    let prefix = "/core/pods/";
    let packed = URL_SAFE_NO_PAD.encode(input);
    let text = String::from_utf8_lossy(input);
    for token in [&packed, &*text] {
        let Ok(read) = Continue::read(token, prefix) else {
            continue;
        };
        assert!(read.start.starts_with(prefix), "a token leads nowhere else");
        assert_eq!(Continue::read(&read.write(prefix), prefix), Ok(read));
    }
    if let Some(canonical) = quantity::canonical(&text) {
        let again = quantity::canonical(&canonical);
        assert_eq!(again.as_ref(), Some(&canonical), "{text:?}");
    }
    for canonical in [time::seconds, time::micros] {
        if let Some(once) = canonical(&text) {
            assert_eq!(canonical(&once), Some(once.clone()), "{text:?}");
        }
    }
    let _ = MediaType::from_content_type(&text);
}
