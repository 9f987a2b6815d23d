//! The head of an answer that a Lambda function streams, ahead of its body: JSON of status, headers
//! and cookies, then eight zeros (AWS Lambda, response streaming by function URLs). Found and cut off
//! here, for callers over HTTP as for outputs.

/// The content type that says that there is one.
const WITH_PRELUDE: &str = "application/vnd.awslambda.http-integration-response";

/// Between the two.
const END: [u8; 8] = [0; 8];

/// Whether an answer of this content type begins with one.
pub fn is_announced_by(content_type: &str) -> bool {
    content_type.starts_with(WITH_PRELUDE)
}

/// Cuts it off what has come of an answer, which is left with its body's beginning. `None`: it has
/// not come to its end.
pub fn cut(come: &mut Vec<u8>) -> Option<Vec<u8>> {
    let at = come.windows(END.len()).position(|bytes| bytes == END)?;
    let body = come.split_off(at + END.len());
    let mut prelude = std::mem::replace(come, body);
    prelude.truncate(at);
    Some(prelude)
}
