//! AWS Signature Version 4, as SDKs sign: whether a request was signed with the node's token as
//! the secret key. Pure.
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/create-signed-request.html>
//!
//! The access key's id may be any; so may the region. What must be signed: `host`, the date, every
//! `x-amz-` header that is there, and the body by its hash. A signature is good for five minutes.

use crate::model::UnixMs;
use ring::{digest, hmac};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SERVICE: &str = "lambda";
const TERMINATOR: &str = "aws4_request";
/// AWS's own: clocks differ, and an overheard request must not be good for ever.
const SKEW_MS: i64 = 5 * 60 * 1000;

/// What was signed, as it came over the wire.
pub struct Request<'a> {
    pub method: &'a str,
    /// Percent-encoded, without the query.
    pub path: &'a str,
    pub query: &'a str,
    /// Lower-case names.
    pub headers: &'a [(String, String)],
    pub body: &'a [u8],
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    #[error(
        "the request is not signed; sign it (AWS Signature Version 4) with the node's token as the secret access key"
    )]
    Missing,
    #[error("the Authorization header is none of Signature Version 4: {0}")]
    Malformed(&'static str),
    #[error("`{0}` must be among SignedHeaders")]
    Unsigned(String),
    #[error("the signature's date, {0}, is more than five minutes from this node's clock")]
    Expired(String),
    #[error(
        "this node's clock can't be right, so that no signature's date can be checked; use the token as Bearer"
    )]
    Clock,
    #[error("the signature does not match: the secret access key must be the node's token")]
    Different,
}

/// Whether a header's value asks for this kind of check.
pub fn is_signature(authorization: &str) -> bool {
    authorization.starts_with(ALGORITHM)
}

pub fn verify(request: &Request<'_>, secret: &[u8], now: UnixMs) -> Result<(), Mismatch> {
    verify_for(SERVICE, request, secret, now)
}

fn verify_for(service: &str, request: &Request<'_>, secret: &[u8], now: UnixMs) -> Result<(), Mismatch> {
    let authorization = value(request.headers, "authorization").ok_or(Mismatch::Missing)?;
    let authorization = Authorization::parse(&authorization)?;
    let date = value(request.headers, "x-amz-date").ok_or(Mismatch::Malformed("X-Amz-Date is missing"))?;
    let [day, _, its_service, terminator] = authorization.scope;
    if its_service != service || terminator != TERMINATOR {
        return Err(Mismatch::Malformed("the credential's scope is DATE/REGION/lambda/aws4_request"));
    }
    if !date.starts_with(day) || day.len() != 8 {
        return Err(Mismatch::Malformed("the credential's day is not that of X-Amz-Date"));
    }
    let signed: Vec<&str> = authorization.signed_headers.split(';').collect();
    let must = |name: &str| name == "host" || name.starts_with("x-amz-");
    let missing = request.headers.iter().find(|(name, _)| must(name) && !signed.contains(&name.as_str()));
    if let Some((name, _)) = missing {
        return Err(Mismatch::Unsigned(name.clone()));
    }
    if !signed.contains(&"host") {
        return Err(Mismatch::Unsigned("host".to_owned()));
    }
    if !now.is_plausible() {
        return Err(Mismatch::Clock);
    }
    // ISO 8601's basic format and no other of its forms: the length tells.
    let when = date.parse::<jiff::Timestamp>().ok().filter(|_| date.len() == "20260101T000000Z".len());
    let when = when.ok_or(Mismatch::Malformed("X-Amz-Date is like 20260101T000000Z"))?;
    if (when.as_millisecond() - now.0).abs() > SKEW_MS {
        return Err(Mismatch::Expired(date.chars().take(20).collect()));
    }

    let canonical = canonical(request, &signed)?;
    let scope = authorization.scope.join("/");
    let to_sign = format!("{ALGORITHM}\n{date}\n{scope}\n{}", hex(sha256(canonical.as_bytes()).as_ref()));
    let mut key = [b"AWS4", secret].concat();
    for part in authorization.scope {
        key = mac(&key, part.as_bytes()).as_ref().to_vec();
    }
    let signature = unhex(authorization.signature).ok_or(Mismatch::Malformed("the signature is not hex"))?;
    // In constant time.
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &key), to_sign.as_bytes(), &signature)
        .map_err(|_| Mismatch::Different)
}

struct Authorization<'a> {
    /// Day, region, service, terminator.
    scope: [&'a str; 4],
    signed_headers: &'a str,
    signature: &'a str,
}

impl<'a> Authorization<'a> {
    fn parse(text: &'a str) -> Result<Self, Mismatch> {
        let rest = text.strip_prefix(ALGORITHM).ok_or(Mismatch::Missing)?;
        let part = |name: &str| {
            let mut parts = rest.split(',').map(str::trim);
            parts.find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
        };
        let credential = part("Credential").ok_or(Mismatch::Malformed("Credential is missing"))?;
        // An access key's id may hold slashes; the scope is the end.
        let mut scope: Vec<&str> = credential.rsplitn(5, '/').collect();
        if scope.len() != 5 {
            return Err(Mismatch::Malformed("Credential is KEY/DATE/REGION/lambda/aws4_request"));
        }
        scope.truncate(4);
        scope.reverse();
        let scope = scope.try_into().map_err(|_| Mismatch::Malformed("Credential has four parts"))?;
        let signed_headers = part("SignedHeaders").ok_or(Mismatch::Malformed("SignedHeaders is missing"))?;
        let signature = part("Signature").ok_or(Mismatch::Malformed("Signature is missing"))?;
        Ok(Self { scope, signed_headers, signature })
    }
}

fn canonical(request: &Request<'_>, signed: &[&str]) -> Result<String, Mismatch> {
    let mut query: Vec<(String, String)> = request
        .query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (reencode(name), reencode(value)))
        .collect();
    query.sort();
    let query: Vec<String> = query.into_iter().map(|(name, value)| format!("{name}={value}")).collect();

    let mut headers = String::new();
    for name in signed {
        let value = value(request.headers, name).ok_or_else(|| {
            Mismatch::Unsigned(format!(
                "{} (signed, but not there)",
                name.chars().take(40).collect::<String>()
            ))
        })?;
        headers.extend([name, ":", value.as_str(), "\n"]);
    }
    Ok(format!(
        "{}\n{}\n{}\n{headers}\n{}\n{}",
        request.method,
        // Every service but S3 encodes what is encoded once more.
        encode(request.path.as_bytes(), true),
        query.join("&"),
        signed.join(";"),
        hex(sha256(request.body).as_ref()),
    ))
}

/// All lines of a name, as they are signed.
fn value(headers: &[(String, String)], name: &str) -> Option<String> {
    let values: Vec<String> = headers
        .iter()
        .filter(|(known, _)| known == name)
        .map(|(_, value)| value.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" "))
        .collect();
    (!values.is_empty()).then(|| values.join(","))
}

/// A query's part, encoded as signatures want it, however it was.
fn reencode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let coded = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok()).and_then(unhex);
        match (first, coded) {
            (b'%', Some(byte)) => {
                bytes.extend(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    encode(&bytes, false)
}

fn encode(bytes: &[u8], slashes_stay: bool) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (slashes_stay && byte == b'/') {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

fn sha256(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}

fn mac(key: &[u8], data: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[u8] = b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
    /// 2015-08-30T12:36:00Z, the day of AWS's test suite; this build's clock is later.
    const DAY: &str = "20150830T123600Z";

    fn headers(lines: &[(&str, &str)]) -> Vec<(String, String)> {
        lines.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// As a client does it: the test suite's dates are too old for a plausible clock, so requests
    /// are signed here, by the code below that the suite's own values check.
    fn sign(request: &Request<'_>, service: &str, date: &str, signed: &[&str], secret: &[u8]) -> String {
        let scope = format!("{}/us-east-1/{service}/aws4_request", &date[..8]);
        let canonical = canonical(request, signed).expect("all are there");
        let to_sign = format!("{ALGORITHM}\n{date}\n{scope}\n{}", hex(sha256(canonical.as_bytes()).as_ref()));
        let mut key = [b"AWS4", secret].concat();
        for part in scope.split('/') {
            key = mac(&key, part.as_bytes()).as_ref().to_vec();
        }
        let signature = hex(mac(&key, to_sign.as_bytes()).as_ref());
        format!(
            "{ALGORITHM} Credential=AKID/{scope}, SignedHeaders={}, Signature={signature}",
            signed.join(";")
        )
    }

    #[test]
    fn signatures_are_those_of_the_published_test_suite() {
        let host = ("host", "example.amazonaws.com");
        let lines = headers(&[host, ("x-amz-date", DAY)]);
        let vanilla = Request { method: "GET", path: "/", query: "", headers: &lines, body: b"" };
        // get-vanilla, get-vanilla-query-order-key-case, post-vanilla
        for (method, query, signature) in [
            ("GET", "", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
            (
                "GET",
                "Param2=value2&Param1=value1",
                "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
            ),
            ("POST", "", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        ] {
            let request = Request { method, query, ..vanilla };
            let got = sign(&request, "service", DAY, &["host", "x-amz-date"], SECRET);
            assert!(got.ends_with(signature), "{method} {query}: {got}");
        }
    }

    fn now() -> (UnixMs, String) {
        let now = UnixMs(crate::model::time::BUILT.0 + 86_400_000);
        let date = jiff::Timestamp::from_millisecond(now.0).expect("a time").strftime("%Y%m%dT%H%M%SZ");
        (now, date.to_string())
    }

    fn ask(change: impl Fn(&mut Vec<(String, String)>), path: &str, body: &[u8]) -> Result<(), Mismatch> {
        let (now, date) = now();
        let mut lines = headers(&[
            ("host", "gw:8080"),
            ("x-amz-date", &date),
            ("x-amz-invocation-type", "Event"),
            ("user-agent", "x"),
        ]);
        let signed = ["host", "x-amz-date", "x-amz-invocation-type"];
        let request = Request {
            method: "POST",
            path: "/f%3Ag",
            query: "Qualifier=%24LATEST",
            headers: &lines,
            body: b"{}",
        };
        let authorization = sign(&request, "lambda", &date, &signed, b"token");
        lines.push(("authorization".to_owned(), authorization));
        change(&mut lines);
        let request = Request { method: "POST", path, query: "Qualifier=$LATEST", headers: &lines, body };
        verify(&request, b"token", now)
    }

    #[test]
    fn what_was_signed_may_not_be_changed() {
        let same = |_: &mut Vec<(String, String)>| {};

        assert_eq!(ask(same, "/f%3Ag", b"{}"), Ok(()));
        assert_eq!(ask(same, "/f%3Ag", b"{ }"), Err(Mismatch::Different));
        assert_eq!(ask(same, "/f%3ah", b"{}"), Err(Mismatch::Different));
        let kind = |lines: &mut Vec<(String, String)>| lines[2].1 = "DryRun".to_owned();
        assert_eq!(ask(kind, "/f%3Ag", b"{}"), Err(Mismatch::Different));
        let more = |lines: &mut Vec<(String, String)>| lines.push(("x-amz-log-type".into(), "Tail".into()));
        assert_eq!(ask(more, "/f%3Ag", b"{}"), Err(Mismatch::Unsigned("x-amz-log-type".into())));
        let other = |lines: &mut Vec<(String, String)>| lines[3].1 = "y".to_owned();
        assert_eq!(ask(other, "/f%3Ag", b"{}"), Ok(()), "the agent is not signed");
        let gone = |lines: &mut Vec<(String, String)>| lines.truncate(4);
        assert_eq!(ask(gone, "/f%3Ag", b"{}"), Err(Mismatch::Missing));
    }

    #[test]
    fn signature_is_good_for_five_minutes_of_a_clock_that_can_be_right() {
        let (now, date) = now();
        let mut lines = headers(&[("host", "gw"), ("x-amz-date", &date)]);
        let request = Request { method: "POST", path: "/", query: "", headers: &lines, body: b"" };
        let authorization = sign(&request, "lambda", &date, &["host", "x-amz-date"], b"token");
        lines.push(("authorization".to_owned(), authorization));
        let at = |ms: i64| {
            let request = Request { method: "POST", path: "/", query: "", headers: &lines, body: b"" };
            verify(&request, b"token", UnixMs(ms))
        };

        assert_eq!(at(now.0 + 290_000), Ok(()));
        assert!(matches!(at(now.0 + 310_000), Err(Mismatch::Expired(_))));
        assert!(matches!(at(now.0 - 310_000), Err(Mismatch::Expired(_))));
        assert_eq!(at(0), Err(Mismatch::Clock));
    }

    #[test]
    fn any_authorization_is_answered() {
        let (now, date) = now();
        for text in [
            "",
            "Basic x",
            "AWS4-HMAC-SHA256",
            "AWS4-HMAC-SHA256 Credential=a, SignedHeaders=host, Signature=0",
            "AWS4-HMAC-SHA256 Credential=a/b/c/lambda/aws4_request, SignedHeaders=, Signature=\u{e9}\u{e9}",
            "AWS4-HMAC-SHA256 Credential=////, SignedHeaders=host, Signature=00",
        ] {
            let lines = headers(&[("host", "gw"), ("x-amz-date", &date), ("authorization", text)]);
            let request = Request { method: "POST", path: "/", query: "%&=%zz", headers: &lines, body: b"" };
            assert!(verify(&request, b"token", now).is_err(), "{text}");
        }
    }
}
