//! (to be written)
use super::{Config, Machine, Problem};

pub(super) fn parse(_file: &str, _text: &str, _machine: &Machine) -> Result<Config, Vec<Problem>> {
    todo!()
}
