//! (to be written)
use super::{Config, Problem};
use crate::model::Manifest;

pub fn parse(_file: &str, _text: &str, _config: &Config) -> Result<Manifest, Vec<Problem>> {
    todo!()
}
