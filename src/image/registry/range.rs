//! What an answer to `Range: bytes=N-` means for a blob of which N bytes are here. Pure.
//!
//! Nothing that a server says of itself is believed further than this: that its bytes go to this
//! place. Whether they are the right ones, the digest says at the end.

/// What to do with the body of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Skip so many bytes, which are here, then take the rest.
    Take { skip: u64 },
    /// It contradicts the request or itself: not a byte of it is used.
    Refuse(&'static str),
}

/// `have` of `size` bytes are here; the answer has `status` 200 or 206.
pub fn judge(status: u16, content_range: Option<&str>, length: Option<u64>, have: u64, size: u64) -> Body {
    if status == 200 {
        // The server has no ranges: all of it comes again.
        return match length {
            Some(length) if length != size => Body::Refuse("its length is not the blob's"),
            _ => Body::Take { skip: have },
        };
    }
    let Some((first, last, total)) = content_range.and_then(parse) else {
        return Body::Refuse("a part of the blob without a usable Content-Range");
    };
    match () {
        () if total.is_some_and(|total| total != size) => Body::Refuse("a part of a blob of another size"),
        () if first > have => Body::Refuse("another part of the blob than was asked for"),
        () if last.checked_add(1) != Some(size) => Body::Refuse("a part that ends before the blob"),
        () if length.is_some_and(|length| length != size - first) => {
            Body::Refuse("a part whose length is not what its Content-Range says")
        }
        () => Body::Take { skip: have - first },
    }
}

/// `bytes FIRST-LAST/TOTAL` (RFC 9110 §14.4); a total of `*` is unknown.
fn parse(header: &str) -> Option<(u64, u64, Option<u64>)> {
    let (range, total) = header.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((first, last, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_part_that_was_asked_for_is_taken() {
        let part = |range: &str, length: Option<u64>| judge(206, Some(range), length, 40, 100);

        assert_eq!(part("bytes 40-99/100", Some(60)), Body::Take { skip: 0 });
        assert_eq!(part("bytes 40-99/*", None), Body::Take { skip: 0 });
        // More than was asked for has what was asked for in it.
        assert_eq!(part("bytes 0-99/100", Some(100)), Body::Take { skip: 40 });
        for lie in [
            "bytes 41-99/100",
            "bytes 40-98/100",
            "bytes 40-99/101",
            "bytes 40-100/101",
            "bytes 99-40/100",
            "bytes */100",
            "bytes 40-18446744073709551615/*",
            "octets 40-99/100",
            "bytes +40-99/100x",
            "",
        ] {
            assert!(matches!(part(lie, None), Body::Refuse(_)), "{lie}");
        }
        assert!(matches!(part("bytes 40-99/100", Some(59)), Body::Refuse(_)));
        assert!(matches!(judge(206, None, Some(60), 40, 100), Body::Refuse(_)));
    }

    #[test]
    fn whole_blob_instead_of_a_part_is_skipped_over() {
        assert_eq!(judge(200, None, Some(100), 40, 100), Body::Take { skip: 40 });
        assert_eq!(judge(200, None, None, 0, 100), Body::Take { skip: 0 });
        assert!(matches!(judge(200, None, Some(99), 40, 100), Body::Refuse(_)));
    }
}
