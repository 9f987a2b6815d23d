//! InvokeWithResponseStream: the payload as it comes, in frames of AWS's event stream.
//! <https://docs.aws.amazon.com/lambda/latest/api/API_InvokeWithResponseStream.html>
//!
//! ```text
//! frame: whole length u32 | headers' length u32 | CRC32 of both | headers | payload | CRC32 of all before
//! header: name's length u8 | name | 7 (a string) | value's length u16 | value
//! ```
//!
//! Any number of `PayloadChunk`s, then one `InvokeComplete`, which says whether the function failed.

use super::{Answered, Asked, CallError, Fault, Kind, asked, described, failed, tail};
use crate::ingress::http::functions::ask;
use crate::ingress::http::problem::{Refusal, set_header};
use crate::ingress::http::{Request, Shared};
use crate::model::Failure;
use crate::net::http::{Piece, header, produced};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use smol::channel::Sender;
use tide::{Response, StatusCode};

/// Larger pieces are sent as several frames: a client holds a whole one.
const CHUNK_BYTES_MAX: usize = 64 << 10;

/// POST /2021-11-15/functions/{name}/response-streaming-invocations?Qualifier=
pub async fn invoke_streaming(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    Ok(answer(&shared, &mut request).await.unwrap_or_else(Response::from))
}

async fn answer(shared: &Shared, request: &mut Request) -> Result<Response, Fault> {
    let Asked { deployment, version, event, kind, log_tail, place } = asked(shared, request).await?;
    let (id, name) = (event.id.clone(), deployment.revision.name().clone());
    let mut response = match kind {
        Kind::Event => {
            return Err(Fault::parameter("a streamed InvocationType is RequestResponse or DryRun"));
        }
        Kind::DryRun => Response::new(StatusCode::NoContent),
        Kind::RequestResponse => {
            let answered = ask(shared, name.clone(), event, None).await;
            let answered = match answered {
                Err(CallError::Failed { failure, output }) => Err(failed(&deployment, &failure, output, &id)
                    .ok_or(CallError::Failed { failure, output: Vec::new() })?),
                other => Ok(other?),
            };
            let shared = shared.clone();
            let end_id = id.clone();
            let mut response = Response::new(StatusCode::Ok);
            response.set_body(produced(move |pieces| async move {
                let _place = place;
                let error = match answered {
                    Ok(answer) => match send(&pieces, answer, &end_id).await {
                        Ok(error) => error,
                        Err(Gone) => return,
                    },
                    Err(error) => Some(error),
                };
                let log = log_tail.then(|| tail(&shared, &name, &end_id));
                let _ = pieces.send(complete(error.as_deref(), log.as_deref())).await;
            }));
            response.insert_header("content-type", "application/vnd.amazon.eventstream");
            response.insert_header("x-amzn-remapped-content-type", "application/octet-stream");
            response
        }
    };
    set_header(&mut response, "x-amz-executed-version", &version);
    set_header(&mut response, "x-amzn-requestid", id.as_str());
    Ok(response)
}

/// The caller has left.
struct Gone;

/// The payload, piece by piece; what the function failed with, if it did.
async fn send(
    pieces: &Sender<Vec<u8>>,
    answer: Answered,
    id: &crate::model::EventId,
) -> Result<Option<Vec<u8>>, Gone> {
    match answer {
        Answered::Output { output, .. } => {
            chunks(pieces, &output).await?;
            Ok(None)
        }
        Answered::Passed(mut answer) => {
            let failed = !(200..300).contains(&answer.status);
            let mut said = Vec::new();
            loop {
                match answer.body.piece().await {
                    None => break,
                    Some(Ok(Piece::Data(data))) if failed => said.extend_from_slice(&data),
                    Some(Ok(Piece::Data(data))) => chunks(pieces, &data).await?,
                    // What a runtime says of a response that it had begun; base64.
                    Some(Ok(Piece::Trailers(lines))) => {
                        if header(&lines, "lambda-runtime-function-error-type").is_some() {
                            let told = header(&lines, "lambda-runtime-function-error-body").unwrap_or("");
                            let plain = STANDARD.decode(told).unwrap_or_else(|_| told.as_bytes().to_vec());
                            return Ok(Some(plain));
                        }
                    }
                    Some(Err(_)) => {
                        let broken = Failure::Answer("the response broke off".to_owned());
                        return Ok(Some(described(&broken, id)));
                    }
                }
                said.truncate(CHUNK_BYTES_MAX);
            }
            Ok(failed.then_some(said))
        }
    }
}

async fn chunks(pieces: &Sender<Vec<u8>>, data: &[u8]) -> Result<(), Gone> {
    for chunk in data.chunks(CHUNK_BYTES_MAX) {
        let frame = frame("PayloadChunk", "application/octet-stream", chunk);
        pieces.send(frame).await.map_err(|_| Gone)?;
    }
    Ok(())
}

fn complete(error: Option<&[u8]>, log: Option<&str>) -> Vec<u8> {
    let mut end = serde_json::Map::new();
    if let Some(error) = error {
        end.insert("ErrorCode".to_owned(), "Unhandled".into());
        end.insert("ErrorDetails".to_owned(), String::from_utf8_lossy(error).into());
    }
    if let Some(log) = log {
        end.insert("LogResult".to_owned(), log.into());
    }
    frame("InvokeComplete", "application/json", serde_json::Value::Object(end).to_string().as_bytes())
}

fn frame(kind: &str, content_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut headers = Vec::new();
    for (name, value) in [(":event-type", kind), (":content-type", content_type), (":message-type", "event")]
    {
        headers.push(name.len() as u8);
        headers.extend_from_slice(name.as_bytes());
        headers.push(7);
        headers.extend_from_slice(&(value.len() as u16).to_be_bytes());
        headers.extend_from_slice(value.as_bytes());
    }
    let whole = 16 + headers.len() + payload.len();
    let mut frame = Vec::with_capacity(whole);
    frame.extend_from_slice(&(whole as u32).to_be_bytes());
    frame.extend_from_slice(&(headers.len() as u32).to_be_bytes());
    frame.extend_from_slice(&crc32(&frame).to_be_bytes());
    frame.extend_from_slice(&headers);
    frame.extend_from_slice(payload);
    frame.extend_from_slice(&crc32(&frame).to_be_bytes());
    frame
}

/// IEEE 802.3's, as in gzip.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_those_of_the_specification() {
        let frame = frame("PayloadChunk", "application/octet-stream", b"hello");

        let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(number(0) as usize, frame.len());
        assert_eq!(number(8), crc32(&frame[..8]));
        let end = 12 + number(4) as usize;
        assert_eq!(&frame[end..frame.len() - 4], b"hello");
        assert_eq!(number(frame.len() - 4), crc32(&frame[..frame.len() - 4]));
        assert_eq!(&frame[12..27], b"\x0b:event-type\x07\x00\x0c");
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926, "the check value of CRC-32/ISO-HDLC");
    }
}
