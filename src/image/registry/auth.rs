//! Who we are to a registry: what it asks for (`WWW-Authenticate`, RFC 9110 §11.6.1; distribution's
//! token flow) and what docker's config.json holds for it. Pure but for reading that file.

use super::Url;
use crate::image::ImageError;
use crate::image::limits::{io, refuse};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Docker's own is a page.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What a registry asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    Bearer { realm: Url, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The first that we can answer; bearer before basic, as docker does.
    pub fn parse(header: &str) -> Option<Self> {
        let challenges = challenges(header);
        let bearer = challenges.iter().find_map(|(scheme, parameters)| {
            let get = |name: &str| parameters.get(name).cloned();
            let realm = Url::parse(&get("realm")?)?;
            let bearer = Self::Bearer { realm, service: get("service"), scope: get("scope") };
            scheme.eq_ignore_ascii_case("bearer").then_some(bearer)
        });
        let basic = challenges.iter().any(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"));
        bearer.or(basic.then_some(Self::Basic))
    }
}

/// Schemes and their parameters, quoted or not.
fn challenges(header: &str) -> Vec<(String, BTreeMap<String, String>)> {
    let mut found: Vec<(String, BTreeMap<String, String>)> = Vec::new();
    let mut rest = header.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let end = rest.find([' ', ',', '=', '\t']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after = after.trim_start_matches([' ', '\t']);
        rest = match after.strip_prefix('=') {
            Some(value) => {
                let (value, left) = parameter(value.trim_start_matches([' ', '\t']));
                if let Some((_, parameters)) = found.last_mut() {
                    parameters.insert(word.to_ascii_lowercase(), value);
                }
                left
            }
            None if word.is_empty() => return found, // not of this grammar: what came before counts
            None => {
                found.push((word.to_owned(), BTreeMap::new()));
                after
            }
        };
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    found
}

fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(letters.next().map(|(_, letter)| letter)),
            letter => value.push(letter),
        }
    }
    (value, "")
}

#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    Basic {
        user: String,
        password: String,
    },
    /// An OAuth2 refresh token.
    Identity(String),
    /// A bearer token as it is.
    Registry(String),
}

impl Credential {
    /// As an `Authorization` for the registry itself or its token service.
    pub fn basic(&self) -> Option<String> {
        let Self::Basic { user, password } = self else { return None };
        Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }
}

/// docker's config.json, as far as it concerns us.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DockerConfig {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl DockerConfig {
    pub fn read(path: &Path) -> Result<Self, ImageError> {
        let doing = || format!("read {}", path.display());
        let mut text = Vec::new();
        let file = std::fs::File::open(path).map_err(io(doing()))?;
        file.take(CONFIG_BYTES_MAX).read_to_end(&mut text).map_err(io(doing()))?;
        // serde's own words would quote what may be a password.
        serde_json::from_slice(&text)
            .map_err(|e| refuse(format!("{}: line {} is not docker's config.json", path.display(), e.line())))
    }

    /// `Ok(None)`: nothing is known of this registry, it is asked anonymously.
    pub fn credential(&self, registry: &str) -> Result<Option<Credential>, ImageError> {
        let helper = |helper: &str| {
            let text = format!("the password for {registry} is kept by a credential helper ({helper})");
            refuse(format!(
                "{text}, a program that neap does not run; put it into `auths` (docker login without a helper does)"
            ))
        };
        if let Some((_, name)) = self.cred_helpers.iter().find(|(key, _)| names(key, registry)) {
            return Err(helper(name));
        }
        let Some((_, entry)) = self.auths.iter().find(|(key, _)| names(key, registry)) else {
            return Ok(None);
        };
        let bad = || refuse(format!("docker's config.json holds no usable `auth` for {registry}"));
        let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
        if let Some(token) = text(&entry.registrytoken) {
            return Ok(Some(Credential::Registry(token)));
        }
        if let Some(token) = text(&entry.identitytoken) {
            return Ok(Some(Credential::Identity(token)));
        }
        if let Some(auth) = text(&entry.auth) {
            let bytes = STANDARD.decode(auth.trim()).map_err(|_| bad())?;
            let pair = String::from_utf8(bytes).map_err(|_| bad())?;
            let (user, password) = pair.split_once(':').ok_or_else(bad)?;
            // docker pads its own with NULs.
            let password = password.trim_end_matches('\0').to_owned();
            return Ok(Some(Credential::Basic { user: user.to_owned(), password }));
        }
        match (text(&entry.username), text(&entry.password), &self.creds_store) {
            (Some(user), Some(password), _) => Ok(Some(Credential::Basic { user, password })),
            (_, _, Some(store)) => Err(helper(store)),
            _ => Err(bad()),
        }
    }
}

/// Keys are hosts, or the URLs that docker login was once given.
fn names(key: &str, registry: &str) -> bool {
    let key = key.strip_prefix("https://").or(key.strip_prefix("http://")).unwrap_or(key);
    let host = key.split('/').next().unwrap_or(key);
    let hub = |host: &str| ["docker.io", "index.docker.io", "registry-1.docker.io"].contains(&host);
    host.eq_ignore_ascii_case(registry) || hub(host) && hub(registry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_registries_write_them() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull""#;
        let Some(Challenge::Bearer { realm, service, scope }) = Challenge::parse(hub) else {
            panic!("{hub}")
        };
        assert_eq!(realm.to_string(), "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert_eq!(scope.as_deref(), Some("repository:library/x:pull"));

        let both = r#"Basic realm="a, b\"c" , bearer realm=http://h/t, error="invalid_token""#;
        assert!(matches!(Challenge::parse(both), Some(Challenge::Bearer { service: None, .. })));
        assert_eq!(Challenge::parse("basic realm=x"), Some(Challenge::Basic));
        for none in
            ["", ",,,", "Negotiate", "Bearer realm=\"nonsense\"", "=", "Bearer =\"", "Bearer realm=\"\\"]
        {
            assert_eq!(Challenge::parse(none), None, "{none}");
        }
    }

    fn credential(json: &str, registry: &str) -> Result<Option<Credential>, String> {
        let config: DockerConfig = serde_json::from_str(json).expect("JSON");
        config.credential(registry).map_err(|error| error.to_string())
    }

    #[test]
    fn credentials_come_from_auths_by_host() {
        let json = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dTpwOnE="}, "h:5000": {"identitytoken": "t"}}}"#;
        let basic = Credential::Basic { user: "u".into(), password: "p:q".into() };

        assert!(credential(json, "registry-1.docker.io") == Ok(Some(basic)));
        assert!(credential(json, "h:5000") == Ok(Some(Credential::Identity("t".into()))));
        assert!(credential(json, "h").is_ok_and(|none| none.is_none()));
    }

    #[test]
    fn credential_helpers_are_refused_with_the_way_out_and_no_secret() {
        let said = |json: &str| credential(json, "h.x").err().expect("refused");

        assert!(said(r#"{"credHelpers": {"h.x": "pass"}}"#).contains("`auths`"));
        assert!(said(r#"{"credsStore": "desktop", "auths": {"h.x": {}}}"#).contains("desktop"));
        assert!(!said(r#"{"auths": {"h.x": {"auth": "c2VjcmV0"}}}"#).contains("secret"));
    }
}
