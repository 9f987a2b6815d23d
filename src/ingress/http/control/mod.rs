//! `/v1`, which the command line speaks (`model::api` has the table). Every handler here is
//! behind `Shared::known`.

pub mod functions;
pub mod images;
pub mod logs;
pub mod queues;
pub mod secrets;
pub mod status;

use super::problem::Refusal;
use super::{Request, event};
use serde::Serialize;
use std::str::FromStr;
use tide::{Response, StatusCode};

/// Rows of a listing when the caller does not say, and the most it may ask for.
const ROWS: u32 = 100;
const ROWS_MAX: u32 = 1000;

pub fn json(value: &impl Serialize) -> Result<Response, Refusal> {
    let body = serde_json::to_vec(value).map_err(|error| Refusal::internal(&error))?;
    let mut response = Response::new(StatusCode::Ok);
    response.set_body(body);
    response.insert_header("content-type", "application/json");
    Ok(response)
}

fn ndjson(body: http_types::Body) -> Response {
    let mut response = Response::new(StatusCode::Ok);
    response.set_body(body);
    response.insert_header("content-type", "application/x-ndjson");
    // A proxy in front must not hold lines back.
    response.insert_header("x-accel-buffering", "no");
    response
}

pub fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A path parameter, decoded.
fn param(request: &Request, name: &str) -> Result<String, Refusal> {
    let text = event::decode(request.param(name).unwrap_or(""));
    text.ok_or_else(|| Refusal::bad_request("the path is not UTF-8"))
}

/// The query: every key is known or the request is refused.
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn of(request: &Request, known: &[&str]) -> Result<Self, Refusal> {
        let pairs: Vec<(String, String)> = request.url().query_pairs().into_owned().collect();
        match pairs.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            Some((key, _)) => {
                let key: String = key.chars().take(40).collect();
                let detail = format!("unknown query key `{key}`; known here: {}", known.join(", "));
                Err(Refusal::bad_request(detail))
            }
            None => Ok(Self(pairs)),
        }
    }

    /// Empty is as if it were not there.
    pub fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str());
        value.filter(|value| !value.is_empty())
    }

    pub fn parse<T: FromStr>(&self, key: &str) -> Result<Option<T>, Refusal> {
        let parse = |text: &str| {
            text.parse()
                .map_err(|_| Refusal::bad_request(format!("query key `{key}` is not a number in range")))
        };
        self.get(key).map(parse).transpose()
    }

    pub fn flag(&self, key: &str) -> Result<bool, Refusal> {
        match self.get(key) {
            None | Some("0" | "false") => Ok(false),
            Some("1" | "true") => Ok(true),
            Some(_) => Err(Refusal::bad_request(format!("query key `{key}` is 0 or 1"))),
        }
    }

    fn limit(&self) -> Result<u32, Refusal> {
        match self.parse::<u32>("limit")? {
            None => Ok(ROWS),
            Some(limit @ 1..=ROWS_MAX) => Ok(limit),
            Some(_) => Err(Refusal::bad_request(format!("limit is 1 to {ROWS_MAX}"))),
        }
    }
}
