//! What an Accept header asks for: the encoding of an answer, and the form of the objects in it.

use http::{HeaderMap, header};

use super::request::Query;
use super::status::Status;
use super::table::Include;

/// The form in which an answer is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Object,
    /// Rows for printing; the version of meta.k8s.io.
    Table(&'static str, Include),
    /// Metadata only; the version of meta.k8s.io.
    Partial(&'static str),
}

/// How an answer is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Json,
    Yaml,
    Protobuf,
}

impl Encoding {
    /// The encoding of an answer as a whole.
    pub fn negotiate(headers: &HeaderMap, query: &Query) -> Result<Self, Status> {
        let accepted = negotiate(headers, query).map(|(encoding, _)| encoding);
        accepted.ok_or_else(|| Status::not_acceptable(&MEDIA_TYPES))
    }

    /// The encoding of the events of a watch, which YAML does not have.
    pub fn negotiate_stream(headers: &HeaderMap, query: &Query) -> Result<Self, Status> {
        match Self::negotiate(headers, query) {
            Ok(encoding @ (Self::Json | Self::Protobuf)) => Ok(encoding),
            _ => {
                let streamed = [JSON, PROTOBUF].map(|media| format!("{media};stream=watch"));
                Err(Status::not_acceptable(
                    &streamed.each_ref().map(String::as_str),
                ))
            }
        }
    }

    pub fn media_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::Yaml => YAML,
            Self::Protobuf => PROTOBUF,
        }
    }
}

impl Form {
    /// The form of the best offer of the Accept header.
    pub fn negotiate(headers: &HeaderMap, query: &Query) -> Result<Self, Status> {
        let accepted = negotiate(headers, query).map(|(_, form)| form);
        accepted.ok_or_else(|| Status::not_acceptable(&MEDIA_TYPES))
    }
}

const JSON: &str = "application/json";
const YAML: &str = "application/yaml";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
/// What objects are served as.
pub const MEDIA_TYPES: [&str; 3] = [JSON, YAML, PROTOBUF];

/// The first offer of the Accept header, by weight and then by place, that can be met.
fn negotiate(headers: &HeaderMap, query: &Query) -> Option<(Encoding, Form)> {
    let given: Vec<&str> = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|accept| accept.to_str().ok())
        .collect();
    let given = given.join(",");
    if given.trim().is_empty() {
        return Some((Encoding::Json, Form::Object));
    }
    let mut offers: Vec<(u16, &str)> = given
        .split(',')
        .map(|offer| (weight(offer), offer))
        .filter(|(weight, _)| *weight > 0)
        .collect();
    offers.sort_by_key(|(weight, _)| std::cmp::Reverse(*weight));
    offers.into_iter().find_map(|(_, offer)| meet(offer, query))
}

/// The weight of an offer in thousandths, 1000 unless it says otherwise.
fn weight(offer: &str) -> u16 {
    let given = offer
        .split(';')
        .skip(1)
        .find_map(|parameter| parameter.trim().strip_prefix("q="));
    match given.map(str::parse::<f64>) {
        None => 1000,
        Some(Ok(share)) if (0.0..=1.0).contains(&share) => (share * 1000.0) as u16,
        Some(_) => 0,
    }
}

/// What one offer asks for; None when that cannot be given.
fn meet(offer: &str, query: &Query) -> Option<(Encoding, Form)> {
    let mut parameters = offer.split(';').map(str::trim);
    let encoding = match parameters.next().unwrap_or("") {
        JSON | "application/*" | "*/*" => Encoding::Json,
        YAML => Encoding::Yaml,
        PROTOBUF => Encoding::Protobuf,
        _ => return None,
    };
    let (mut of, mut group, mut version) = ("", "", "");
    for (key, value) in parameters.filter_map(|parameter| parameter.split_once('=')) {
        match key {
            "as" => of = value,
            "g" => group = value,
            "v" => version = value,
            _ => {}
        }
    }
    let version = match version {
        "v1" => "v1",
        "v1beta1" => "v1beta1",
        _ => "",
    };
    // Tables have no protobuf form, nor does what is older than v1.
    let plain = encoding != Encoding::Protobuf;
    let form = match (of, group, version) {
        ("", _, _) => Form::Object,
        ("Table", "meta.k8s.io", "v1" | "v1beta1") if plain => {
            let include = match query.get("includeObject") {
                "None" => Include::None,
                "Object" => Include::Object,
                _ => Include::Metadata,
            };
            Form::Table(version, include)
        }
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => {
            Form::Partial("v1")
        }
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1beta1")
            if plain =>
        {
            Form::Partial("v1beta1")
        }
        _ => return None,
    };
    Some((encoding, form))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_known_form_of_an_accept_header_wins() {
        let negotiate = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().expect("header"));
            Form::negotiate(&headers, &Query::default())
        };
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(
            negotiate(kubectl).expect("table"),
            Form::Table("v1", Include::Metadata)
        );
        let metadata = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
        assert_eq!(negotiate(metadata).expect("metadata"), Form::Partial("v1"));
        assert_eq!(
            negotiate("application/vnd.kubernetes.protobuf,application/json").expect("json"),
            Form::Object
        );
        assert_eq!(negotiate("text/html").expect_err("refused").code, 406);
    }

    #[test]
    fn the_heaviest_offer_that_can_be_met_decides_the_encoding() {
        let headers = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().expect("header"));
            headers
        };
        let whole = |accept: &str| Encoding::negotiate(&headers(accept), &Query::default());
        for (accept, encoding) in [
            (
                "application/vnd.kubernetes.protobuf,application/json",
                Encoding::Protobuf,
            ),
            (
                "application/vnd.kubernetes.protobuf;q=0.5, application/json",
                Encoding::Json,
            ),
            (
                "application/json;q=0.1,application/yaml;q=0.2",
                Encoding::Yaml,
            ),
            (
                "application/vnd.kubernetes.protobuf;stream=watch",
                Encoding::Protobuf,
            ),
            ("text/html,*/*;q=0.8", Encoding::Json),
            ("application/cbor, application/json", Encoding::Json),
            (
                "application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io,application/json",
                Encoding::Json,
            ),
            (
                "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;v=v1;g=meta.k8s.io",
                Encoding::Protobuf,
            ),
        ] {
            assert_eq!(whole(accept).expect(accept), encoding, "{accept}");
        }
        for accept in ["application/json;q=0", "application/json;q=x", "text/html"] {
            assert_eq!(whole(accept).expect_err(accept).code, 406);
        }
        let stream = |accept: &str| Encoding::negotiate_stream(&headers(accept), &Query::default());
        assert_eq!(
            stream("application/vnd.kubernetes.protobuf").expect("protobuf"),
            Encoding::Protobuf
        );
        assert_eq!(
            stream("application/yaml").expect_err("refused").message,
            "406: Not Acceptable\n\nAvailable representations: application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch"
        );
    }
}
