//! Answers compressed by gzip, for clients that take them.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Method, header, request::Parts};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as HttpBody, Frame};

use super::reply::{Answer, Body, BodyError};

/// Smaller answers are sent as they are, as upstream.
const BYTES_MIN: u64 = 128 << 10;
/// The fastest level, as upstream: it makes most of the difference.
const LEVEL: u32 = 1;
/// What is compressed at once, so that a large answer neither waits for its end nor is there twice.
const PIECE_BYTES: usize = 64 << 10;

/// Whether the client of a request takes compressed answers. Only reads are worth it.
pub fn wanted(parts: &Parts) -> bool {
    parts.method == Method::GET && accepts(&parts.headers)
}

fn accepts(headers: &HeaderMap) -> bool {
    let offers = headers.get_all(header::ACCEPT_ENCODING).iter();
    let mut offers = offers
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    offers.any(|offer| {
        let mut parameters = offer.split(';').map(str::trim);
        let refused = |parameter: &str| matches!(parameter, "q=0" | "q=0.0" | "q=0.00" | "q=0.000");
        parameters.next() == Some("gzip") && !parameters.any(refused)
    })
}

/// The answer compressed, when it is large enough.
pub fn gzip(answer: Answer) -> Answer {
    let (mut head, body) = answer.into_parts();
    let told = head.headers.get(header::CONTENT_LENGTH);
    let told = told.and_then(|length| length.to_str().ok()?.parse().ok());
    let length = told.or(body.size_hint().exact()).unwrap_or(0);
    if length < BYTES_MIN {
        return Answer::from_parts(head, body);
    }
    head.headers.remove(header::CONTENT_LENGTH);
    let gzip = HeaderValue::from_static("gzip");
    head.headers.insert(header::CONTENT_ENCODING, gzip);
    let vary = HeaderValue::from_static("Accept-Encoding");
    head.headers.append(header::VARY, vary);
    Answer::from_parts(head, compressed(body))
}

fn compressed(body: Body) -> Body {
    let pieces = body.into_data_stream().flat_map(|data| {
        let pieces: Vec<Result<Bytes, BodyError>> = match data {
            Ok(data) => (0..data.len())
                .step_by(PIECE_BYTES)
                .map(|at| Ok(data.slice(at..data.len().min(at + PIECE_BYTES))))
                .collect(),
            Err(error) => vec![Err(error)],
        };
        futures::stream::iter(pieces)
    });
    let encoder = GzEncoder::new(Vec::new(), Compression::new(LEVEL));
    let state = (Box::pin(pieces), Some(encoder));
    let frames = futures::stream::unfold(state, |(mut pieces, encoder)| async move {
        let mut encoder = encoder?;
        loop {
            let outcome = match pieces.next().await {
                Some(Ok(piece)) => encoder.write_all(&piece),
                Some(Err(error)) => return Some((Err(error), (pieces, None))),
                None => {
                    let last = encoder.finish().map_err(BodyError::from);
                    return Some((last.map(frame), (pieces, None)));
                }
            };
            if let Err(error) = outcome {
                return Some((Err(error.into()), (pieces, None)));
            }
            let ready = std::mem::take(encoder.get_mut());
            if !ready.is_empty() {
                return Some((Ok(frame(ready)), (pieces, Some(encoder))));
            }
        }
    });
    StreamBody::new(frames).boxed_unsync()
}

fn frame(bytes: Vec<u8>) -> Frame<Bytes> {
    Frame::data(Bytes::from(bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use http::StatusCode;

    use super::*;
    use crate::api::reply;

    #[test]
    fn an_encoding_that_is_refused_is_not_accepted() {
        for (offer, accepted) in [
            ("gzip", true),
            ("deflate, gzip;q=0.5", true),
            ("gzip;q=0", false),
            ("br", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, offer.parse().unwrap());
            assert_eq!(accepts(&headers), accepted, "{offer}");
        }
    }

    #[tokio::test]
    async fn large_answers_come_back_whole_and_small_ones_are_left_alone() {
        let small = gzip(reply::text(StatusCode::OK, "ok"));
        assert!(!small.headers().contains_key(header::CONTENT_ENCODING));
        let text: String = (0..60_000).map(|n| format!("{n},")).collect();
        let answer = gzip(reply::text(StatusCode::OK, text.clone()));
        assert_eq!(answer.headers()[header::CONTENT_ENCODING], "gzip");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(body.len() < text.len() / 2);
        let mut unpacked = String::new();
        flate2::read::GzDecoder::new(&body[..])
            .read_to_string(&mut unpacked)
            .unwrap();
        assert_eq!(unpacked, text);
    }
}
