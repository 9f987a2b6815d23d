//! DNS messages as far as answering for a function needs them (RFC 1035 §4): whose name is asked
//! for, which addresses an answer has. Everything else is passed on as it is. Bytes of anybody's.

use std::net::Ipv4Addr;

pub const HEADER_BYTES: usize = 12;
/// Names in a message lead back into it; no real one does so more often.
const JUMPS_MAX: usize = 32;
const NAME_BYTES_MAX: usize = 255;

pub const A: u16 = 1;
pub const AAAA: u16 = 28;
const INTERNET: u16 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    NoError = 0,
    FormatError = 1,
    ServerFailure = 2,
    NotImplemented = 4,
    Refused = 5,
}

/// The one question of a query.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// In lower case, without the root's dot.
    pub name: String,
    pub kind: u16,
    /// Where it ends in the message.
    end: usize,
}

/// An error: how to answer what is no question that can be passed on; `None`: not at all.
pub fn question(query: &[u8]) -> Result<Question, Option<Code>> {
    if query.len() < HEADER_BYTES || query[2] & 0x80 != 0 {
        return Err(None); // no query, but an answer, or nothing
    }
    if query[2] & 0x78 != 0 {
        return Err(Some(Code::NotImplemented)); // other than a standard query
    }
    if query[4..6] != [0, 1] {
        return Err(Some(Code::FormatError));
    }
    read_question(query).ok_or(Some(Code::FormatError))
}

fn read_question(message: &[u8]) -> Option<Question> {
    let (name, end) = name(message, HEADER_BYTES)?;
    Some(Question { name, kind: number(message, end)?, end: end + 4 }).filter(|q| q.end <= message.len())
}

/// An answer of our own, without records.
pub fn answer(query: &[u8], question: Option<&Question>, code: Code) -> Vec<u8> {
    let end = question.map_or(HEADER_BYTES, |question| question.end);
    let mut answer = query[..end.min(query.len())].to_vec();
    answer[2] = 0x80 | query[2] & 0x01; // an answer; recursion as it was desired
    answer[3] = 0x80 | code as u8; // recursion is available
    answer[4..12].copy_from_slice(&[0, u8::from(question.is_some()), 0, 0, 0, 0, 0, 0]);
    answer
}

/// Whether this is the answer to that query: its number, its question.
pub fn answers(message: &[u8], query: &[u8], question: &Question) -> bool {
    message.len() >= HEADER_BYTES
        && message[..2] == query[..2]
        && message[2] & 0x80 != 0
        && read_question(message).is_some_and(|q| (&q.name, q.kind) == (&question.name, question.kind))
}

/// The addresses in an answer, whatever aliases lead to them. What is broken has none.
pub fn addresses(message: &[u8]) -> Vec<Ipv4Addr> {
    let mut found = Vec::new();
    let mut read = || -> Option<()> {
        let mut at = read_question(message)?.end;
        for _ in 0..number(message, 6)? {
            let (_, after) = name(message, at)?;
            let (kind, class) = (number(message, after)?, number(message, after + 2)?);
            let length = number(message, after + 8)? as usize;
            let data = message.get(after + 10..after + 10 + length)?;
            if let (A, INTERNET, Ok(address)) = (kind, class, <[u8; 4]>::try_from(data)) {
                found.push(Ipv4Addr::from(address));
            }
            at = after + 10 + length;
        }
        Some(())
    };
    let _ = read();
    found
}

fn number(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// A name and where it ends.
fn name(message: &[u8], start: usize) -> Option<(String, usize)> {
    let mut text = String::new();
    let (mut at, mut end, mut jumps) = (start, None, 0);
    loop {
        let length = *message.get(at)? as usize;
        match length {
            0 => return Some((text, end.unwrap_or(at + 1))),
            1..=63 => {
                let label = message.get(at + 1..at + 1 + length)?;
                if !text.is_empty() {
                    text.push('.');
                }
                // A dot within a label must not look like one between two.
                let shown =
                    |byte: &u8| if byte.is_ascii_graphic() && *byte != b'.' { *byte as char } else { '?' };
                text.extend(label.iter().map(shown).map(|c| c.to_ascii_lowercase()));
                if text.len() > NAME_BYTES_MAX {
                    return None;
                }
                at += 1 + length;
            }
            0xc0..=0xff => {
                end.get_or_insert(at + 2);
                jumps += 1;
                if jumps > JUMPS_MAX {
                    return None;
                }
                at = (number(message, at)? & 0x3fff) as usize;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        bytes
    }

    /// An alias to another name, then two addresses of it.
    fn answered() -> Vec<u8> {
        let mut bytes = query("www.site", A);
        bytes[2] = 0x81;
        bytes[7] = 3;
        bytes.extend_from_slice(&[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 4, 1, b'a', 0xc0, 16]);
        for last in [1, 2] {
            bytes.extend_from_slice(&[1, b'a', 0xc0, 16, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 0, 0, last]);
        }
        bytes
    }

    #[test]
    fn a_question_is_read_and_what_is_none_is_told_apart() {
        let asked = question(&query("WWW.Site", AAAA)).expect("a good question");
        assert_eq!((asked.name.as_str(), asked.kind), ("www.site", AAAA));
        let odd =
            question(&query("a.b", A).iter().map(|b| if *b == b'a' { b'.' } else { *b }).collect::<Vec<_>>());
        assert_eq!(odd.expect("a question").name, "?.b");

        let mut other = query("a", A);
        other[2] = 0x81;
        assert_eq!(question(&other), Err(None), "an answer");
        other[2] = 0x28;
        assert_eq!(question(&other), Err(Some(Code::NotImplemented)));
        let mut two = query("a", A);
        two[5] = 2;
        assert_eq!(question(&two), Err(Some(Code::FormatError)));
    }

    #[test]
    fn addresses_are_found_behind_aliases() {
        let ask = query("www.site", A);
        let asked = question(&ask).expect("a question");

        assert!(answers(&answered(), &ask, &asked));
        assert_eq!(addresses(&answered()), [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)]);
        let refusal = answer(&ask, Some(&asked), Code::Refused);
        assert!(answers(&refusal, &ask, &asked) && refusal[3] & 0xf == 5 && addresses(&refusal).is_empty());
        assert!(!answers(
            &answered(),
            &query("other.site", A),
            &question(&query("other.site", A)).expect("good")
        ));
    }

    #[test]
    fn broken_messages_have_no_name_and_do_no_harm() {
        let whole = answered();
        for length in 0..whole.len() {
            let _ = addresses(&whole[..length]);
            let _ = question(&whole[..length]);
        }
        for at in 0..whole.len() {
            for byte in [0, 1, 63, 64, 0xc0, 0xff] {
                let mut broken = whole.clone();
                broken[at] = byte;
                let _ = addresses(&broken);
                broken[2] = 1;
                if let Ok(asked) = question(&broken) {
                    let _ = answer(&broken, Some(&asked), Code::NoError);
                }
            }
        }
        let mut circle = query("a", A);
        circle[12..14].copy_from_slice(&[0xc0, 12]);
        assert_eq!(question(&circle), Err(Some(Code::FormatError)));
    }
}
