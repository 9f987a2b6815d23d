//! Where an entry of a layer goes: names from outside, turned into paths that can't leave the root.
//!
//! Pure: what the file system has at these paths is for `tree` and `unpack`.

/// Linux's PATH_MAX without the NUL.
const PATH_BYTES_MAX: usize = 4095;
const NAME_BYTES_MAX: usize = 255;
/// Deeper trees could not be removed again: each level is an open descriptor of 1,024. The
/// deepest in the field, nested node_modules, stay below 60.
const DEPTH_MAX: usize = 256;

/// A path below a layer's root: components joined by `/`, none of them empty, `.` or `..`.
/// The empty path is the root itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Place(Vec<u8>);

impl Place {
    /// The `Err` goes behind the entry's name: "entry `…` is absolute".
    pub fn parse(name: &[u8]) -> Result<Self, &'static str> {
        if name.len() > PATH_BYTES_MAX {
            return Err("is longer than 4,095 bytes");
        }
        if name.contains(&0) {
            return Err("holds a NUL byte");
        }
        // `/` alone is how some builders write the root directory's own entry.
        if name.starts_with(b"/") && name != b"/" {
            return Err("is absolute");
        }
        let mut path = Vec::with_capacity(name.len());
        let mut depth = 0;
        for part in name.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".") {
            depth += 1;
            if part == b".." {
                return Err("leads upwards with `..`");
            }
            if part.len() > NAME_BYTES_MAX {
                return Err("has a component longer than 255 bytes");
            }
            if depth > DEPTH_MAX {
                return Err("lies more than 256 directories deep");
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(part);
        }
        Ok(Self(path))
    }

    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|b| *b == b'/').filter(|part| !part.is_empty())
    }

    /// Parent and name; `None` for the root.
    pub fn split(&self) -> Option<(Place, &[u8])> {
        if self.is_root() {
            return None;
        }
        Some(match self.0.iter().rposition(|b| *b == b'/') {
            Some(slash) => (Place(self.0[..slash].to_vec()), &self.0[slash + 1..]),
            None => (Place::default(), &self.0),
        })
    }

    /// `name`: one component that came out of a `Place`.
    pub fn join(&self, name: &[u8]) -> Place {
        if self.is_root() { Place(name.to_vec()) } else { Place([&self.0, &b"/"[..], name].concat()) }
    }

    /// The directories above it, the root first; not itself.
    pub fn ancestors(&self) -> impl Iterator<Item = Place> {
        let root = (!self.is_root()).then(Place::default);
        let slashes = self.0.iter().enumerate().filter(|(_, b)| **b == b'/');
        root.into_iter().chain(slashes.map(|(at, _)| Place(self.0[..at].to_vec())))
    }

    /// The range of an ordered set that holds everything below this place, which is not the root.
    pub fn below(&self) -> std::ops::Range<Place> {
        // `0` follows `/`.
        Place([&self.0, &b"/"[..]].concat())..Place([&self.0, &b"0"[..]].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stay_below_the_root() {
        let parsed = |name: &[u8]| Place::parse(name).map(|p| String::from_utf8_lossy(&p.0).into_owned());
        assert_eq!(parsed(b"./a//b/./c/").as_deref(), Ok("a/b/c"));
        assert_eq!(parsed(b"./").as_deref(), Ok(""));
        assert_eq!(parsed(b"/").as_deref(), Ok(""));
        assert_eq!(parsed(b"a\n/\xff").as_deref(), Ok("a\n/\u{fffd}"));
        for bad in [&b"/etc"[..], b"..", b"a/../b", b"a/..", b"//", b"a\0b"] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
        assert!(parsed(&vec![b'a'; 256]).is_err());
        assert!(parsed(&b"a/".repeat(257)).is_err());
        assert!(parsed(&b"a/".repeat(256)).is_ok());
        assert!(parsed(&b"/a".repeat(3000)).is_err());
    }

    #[test]
    fn ancestors_come_root_first() {
        let place = Place::parse(b"a/b/c").expect("good");

        let ancestors: Vec<_> = place.ancestors().map(|p| p.0).collect();

        assert_eq!(ancestors, [b"".to_vec(), b"a".to_vec(), b"a/b".to_vec()]);
        assert_eq!(Place::default().ancestors().count(), 0);
        assert!(place.below().contains(&Place::parse(b"a/b/c/d").expect("good")));
        assert!(!place.below().contains(&Place::parse(b"a/b/cd").expect("good")));
    }
}
