//! Whether an image fits, before a byte of it is fetched. Pure.
//!
//! A manifest says how large layers are compressed, and not what they unpack to: three times as
//! much is assumed, since images in the field have two to three (Debian 2.6, Alpine 2.2). What
//! grows beyond that is met while it is unpacked, by the same reserve.

use super::ImageError;
use super::limits::MIB;

const GROWTH: u64 = 3;

/// A layer that is not in the store.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub bytes: u64,
    /// Of the blob, already on the disk.
    pub here: u64,
    pub compressed: bool,
}

/// Bytes that a pull will still write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    pub fetch: u64,
    pub unpack: u64,
}

impl Need {
    pub fn of(layers: &[Wanted]) -> Self {
        let mut need = Self::default();
        for layer in layers {
            let growth = if layer.compressed { GROWTH } else { 1 };
            need.fetch = need.fetch.saturating_add(layer.bytes.saturating_sub(layer.here));
            need.unpack = need.unpack.saturating_add(layer.bytes.saturating_mul(growth));
        }
        need
    }

    /// `free`: of the file system; `reserve`: of that, for the database.
    pub fn check(self, free: u64, reserve: u64) -> Result<(), ImageError> {
        let need = self.fetch.saturating_add(self.unpack);
        let missing_bytes = need.saturating_add(reserve).saturating_sub(free);
        if missing_bytes == 0 || need == 0 {
            return Ok(());
        }
        let text = format!(
            "not fetched: it needs {} MiB ({} MiB to fetch, about {} MiB unpacked), and the disk has {} MiB \
             free, of which {} MiB are kept for events; {} MiB are missing (`neap image gc` frees what no \
             function needs)",
            up(need),
            up(self.fetch),
            up(self.unpack),
            free / MIB,
            up(reserve),
            up(missing_bytes)
        );
        Err(ImageError::NoSpace { text, missing_bytes })
    }
}

fn up(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_here_is_not_fetched_and_still_unpacked() {
        let layers = [
            Wanted { bytes: 10 * MIB, here: 4 * MIB, compressed: true },
            Wanted { bytes: 5 * MIB, here: 0, compressed: false },
        ];

        let need = Need::of(&layers);

        assert_eq!(need, Need { fetch: 11 * MIB, unpack: 35 * MIB });
        assert!(need.check(110 * MIB, 64 * MIB).is_ok());
        let Err(ImageError::NoSpace { text, missing_bytes }) = need.check(100 * MIB, 64 * MIB) else {
            panic!("it does not fit")
        };
        assert_eq!(missing_bytes, 10 * MIB);
        for figure in [
            "needs 46 MiB",
            "11 MiB to fetch",
            "35 MiB unpacked",
            "100 MiB free",
            "64 MiB are kept",
            "10 MiB are missing",
        ] {
            assert!(text.contains(figure), "{text}");
        }
    }

    #[test]
    fn image_whose_layers_are_all_there_needs_nothing() {
        assert!(Need::of(&[]).check(0, u64::MAX).is_ok());
        let hostile = [Wanted { bytes: u64::MAX, here: 0, compressed: true }; 2];
        assert!(Need::of(&hostile).check(u64::MAX - 1, 1).is_err());
    }
}
