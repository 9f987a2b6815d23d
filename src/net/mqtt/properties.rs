//! The properties of a PUBLISH (MQTT 5.0 §3.3.2.3).

use super::{Malformed, Publish};
use std::time::Duration;

/// Fills in what `bytes`, the properties without their length, say. A property that may come
/// once and comes twice is malformed, as is one that no PUBLISH has.
pub(super) fn read(publish: &mut Publish, bytes: &[u8]) -> Result<(), Malformed> {
    let mut rest = bytes;
    let mut seen = 0_u64;
    while let Some((&kind, after)) = rest.split_first() {
        rest = after;
        // User properties and subscription identifiers may come any number of times.
        if !matches!(kind, 0x26 | 0x0B) {
            let bit = 1_u64.checked_shl(kind.into()).unwrap_or(0);
            if seen & bit != 0 {
                return Err(Malformed("a property twice"));
            }
            seen |= bit;
        }
        match kind {
            // Payload Format Indicator: the data stays bytes here, whatever it is called.
            0x01 => drop(take(&mut rest, 1)?),
            0x02 => {
                let seconds = take(&mut rest, 4)?.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
                publish.expires = Some(Duration::from_secs(seconds));
            }
            0x03 => publish.content_type = Some(string(&mut rest)?),
            // Response Topic and Correlation Data: neap answers nobody.
            0x08 | 0x09 => {
                field(&mut rest)?;
            }
            0x0B => match super::decode::length(rest)? {
                Some((bytes, id @ 1..)) => {
                    rest = &rest[bytes..];
                    publish.subscriptions.push(id as u32);
                }
                _ => return Err(Malformed("a subscription identifier of 0")),
            },
            0x23 => return Err(Malformed("a topic alias, though we allow none")),
            0x26 => {
                let name = string(&mut rest)?;
                publish.user_properties.push((name, string(&mut rest)?));
            }
            _ => return Err(Malformed("a property that no PUBLISH has")),
        }
    }
    Ok(())
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], Malformed> {
    let (taken, after) = rest.split_at_checked(count).ok_or(Malformed("properties over their length"))?;
    *rest = after;
    Ok(taken)
}

fn field<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let length = take(rest, 2)?;
    take(rest, usize::from(u16::from_be_bytes([length[0], length[1]])))
}

fn string(rest: &mut &[u8]) -> Result<String, Malformed> {
    let text = std::str::from_utf8(field(rest)?).map_err(|_| Malformed("a property that is not UTF-8"))?;
    Ok(text.to_owned())
}
