//! How many instances are kept ready, said without a manifest: a new revision whose manifest is
//! the old one with another `scale.min`. Its image is the one that runs, whatever its name means
//! by now.

use super::switch::Source;
use super::{Ahead, Deployer, failed};
use crate::channels::{DeployError, Deployed};
use crate::model::{Digest, FunctionName};

impl Deployer {
    pub(super) async fn scale(&self, name: &FunctionName, min: u32) -> Result<Deployed, DeployError> {
        let _held = self.turns.hold(name).await;
        self.owned_through_api(name)?;
        let stored = self.store.functions().await.map_err(failed)?;
        let stored = stored.into_iter().find(|stored| stored.name == *name);
        let stored = stored.ok_or_else(|| DeployError::Unknown(name.clone()))?;
        let text = scaled(&stored.revision.manifest, min).map_err(failed)?;
        let image = Digest::parse(&stored.revision.image).map_err(failed)?;
        let file = format!("function `{name}`");
        let source = Source { file: &file, text: &text, owner: None, pinned: Some(&image) };
        self.deploy_held(source, Ahead::Ready).await
    }
}

/// The manifest's text with so many instances kept; `max` grows along.
fn scaled(text: &str, min: u32) -> Result<String, toml::de::Error> {
    let mut root: toml::Table = text.parse()?;
    let scale = root.entry("scale").or_insert_with(|| toml::Table::new().into());
    if let Some(scale) = scale.as_table_mut() {
        let max = scale.get("max").and_then(toml::Value::as_integer);
        if max.unwrap_or(crate::config::defaults::SCALE_MAX.into()) < min.into() {
            scale.insert("max".to_owned(), i64::from(min).into());
        }
        scale.insert("min".to_owned(), i64::from(min).into());
    }
    Ok(root.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_changes_nothing_else() {
        let text = "name = \"f\"\nimage = \"f:1\"\nscale = { max = 6, idle = \"3s\" }\n";

        let some: toml::Table = scaled(text, 2).expect("TOML").parse().expect("TOML");
        let many: toml::Table = scaled(text, 9).expect("TOML").parse().expect("TOML");
        let none: toml::Table = scaled("name = \"f\"", 0).expect("TOML").parse().expect("TOML");

        assert_eq!((some["image"].as_str(), some["scale"]["idle"].as_str()), (Some("f:1"), Some("3s")));
        assert_eq!(
            (some["scale"]["min"].as_integer(), some["scale"]["max"].as_integer()),
            (Some(2), Some(6))
        );
        assert_eq!(
            (many["scale"]["min"].as_integer(), many["scale"]["max"].as_integer()),
            (Some(9), Some(9))
        );
        assert_eq!(none["scale"]["min"].as_integer(), Some(0));
        assert!(none["scale"].get("max").is_none());
    }
}
