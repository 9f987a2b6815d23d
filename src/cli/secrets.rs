//! `neap secret …`. What is set is never shown again.

use super::Session;
use super::args::Secret;
use super::client::{below, parse};
use super::output::tell;
use super::source;
use super::text::{self, Table};
use super::units::Input;
use crate::model::SecretName;
use crate::model::api::SecretSummary;
use crate::model::permissions::SECRET_BYTES_MAX;
use crate::net::http::Body;
use anyhow::Context;

const SECRETS: &str = "/v1/secrets";

pub async fn secret(session: &Session, command: Secret) -> anyhow::Result<()> {
    match command {
        Secret::Set { name, data } => {
            set(session, &name, data).await.with_context(|| format!("set secret {name}"))
        }
        Secret::Ls => ls(session).await.context("list secrets"),
        Secret::Rm { name } => {
            let doing = || format!("rm secret {name}");
            session
                .client
                .bytes("DELETE", &below(SECRETS, &name, ""), Body::Empty)
                .await
                .with_context(doing)?;
            done(session, &format!("{name}: removed"))
        }
    }
}

async fn set(session: &Session, name: &str, data: Option<Input>) -> anyhow::Result<()> {
    // Told before anything is read from a terminal.
    SecretName::parse(name)?;
    let value = source::read(Some(data.unwrap_or(Input::Stdin)), SECRET_BYTES_MAX)?;
    anyhow::ensure!(!value.is_empty(), "the secret is empty");
    session.client.bytes("PUT", &below(SECRETS, name, ""), Body::Bytes(value)).await?;
    done(session, &format!("{name}: set"))
}

async fn ls(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.get(SECRETS).await?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let secrets: Vec<SecretSummary> = parse(&answer)?;
    if secrets.is_empty() {
        tell("no secrets; `neap secret set NAME --data @FILE` makes one");
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "SIZE", "CHANGED", "USED BY"]);
    for secret in &secrets {
        let age = format!("{} ago", text::age(secret.changed, session.now));
        table.row(vec![secret.name.clone(), text::size(secret.bytes), age, secret.used_by.join(", ")]);
    }
    Ok(session.out.text(&table.render(session.out.width))?)
}

fn done(session: &Session, line: &str) -> anyhow::Result<()> {
    if session.out.json() {
        return Ok(());
    }
    Ok(session.out.line(&text::escape(line))?)
}
