//! `GET /`: in a browser a page that shows what `/metrics` says, to others a line about what this
//! is. One static file, without anything from elsewhere: it works where there is no network. What it may do
//! stands in its Content-Security-Policy: its own style and script, by their hashes, and asking
//! this node. It asks with the rights of whoever looks, and builds its rows from text alone.

use super::health::text;
use super::problem::Refusal;
use super::{Request, event};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, digest};
use tide::Response;

const PAGE: &str = include_str!("dashboard.html");

pub async fn show(request: Request) -> Result<Response, Refusal> {
    let accepts = request.header("accept").is_some_and(|values| values.as_str().contains("text/html"));
    if !accepts {
        let node = event::encode(&request.state().api.node);
        let version = env!("CARGO_PKG_VERSION");
        let mut response =
            text(&format!("neap {version} on {node}: functions at the edge, at /function/NAME\n"));
        response.insert_header("vary", "accept");
        return Ok(response);
    }
    let mut response = text(PAGE);
    response.insert_header("content-type", "text/html; charset=utf-8");
    response.insert_header("content-security-policy", policy().as_str());
    response.insert_header("x-content-type-options", "nosniff");
    response.insert_header("referrer-policy", "no-referrer");
    response.insert_header("vary", "accept");
    Ok(response)
}

fn policy() -> String {
    let hash = |tag: &str| {
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let inside = PAGE.split_once(&open).and_then(|(_, rest)| rest.split_once(&close));
        STANDARD.encode(digest(&SHA256, inside.unwrap_or_default().0.as_bytes()))
    };
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_one_script_one_style_and_nothing_from_elsewhere() {
        for tag in ["<script", "<style"] {
            assert_eq!(PAGE.matches(tag).count(), 1, "{tag}: its hash is of the only one");
        }
        for bad in
            ["//", "src=", "href=", "innerHTML", "insertAdjacent", "document.write", "eval(", "onclick"]
        {
            let found = PAGE.lines().find(|line| line.contains(bad) && !line.trim_start().starts_with("// "));
            assert_eq!(found, None, "{bad}");
        }
        assert!(PAGE.len() < 8192);
        let empty = STANDARD.encode(digest(&SHA256, b""));
        assert!(!policy().contains(&empty), "{}", policy());
    }
}
