//! A Lambda function on AWS's own runtime for Rust that does what its event asks for.

use lambda_runtime::streaming::{Body, channel};
use lambda_runtime::{Error, FunctionResponse, LambdaEvent, StreamResponse, run, service_fn};
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    if std::env::var_os("FAIL_INIT").is_some() {
        panic!("no such sensor");
    }
    run(service_fn(handler)).await
}

async fn handler(event: LambdaEvent<Value>) -> Result<FunctionResponse<Value, Body>, Error> {
    let asked = event.payload;
    let said = match asked["do"].as_str().unwrap_or("") {
        "fail" => return Err("bad reading".into()),
        "panic" => panic!("out of range"),
        "exit" => std::process::exit(9),
        "sleep" => {
            tokio::time::sleep(Duration::from_secs(1000)).await;
            Value::Null
        }
        "large" => "x".repeat(asked["bytes"].as_u64().unwrap_or(0) as usize).into(),
        how @ ("stream" | "hang") => return Ok(FunctionResponse::StreamingResponse(stream(how == "hang"))),
        _ => json!({ "event": asked, "id": event.context.request_id, "pid": std::process::id() }),
    };
    Ok(FunctionResponse::BufferedResponse(said))
}

/// Three pieces after a head of its own; one that hangs never comes to its end.
fn stream(hangs: bool) -> StreamResponse<Body> {
    let (mut sender, body) = channel();
    tokio::spawn(async move {
        for piece in ["one ", "two ", "three"] {
            if sender.send_data(piece.into()).await.is_err() {
                return;
            }
            if hangs {
                tokio::time::sleep(Duration::from_secs(1000)).await;
            }
        }
    });
    let mut response = StreamResponse::from(body);
    response.metadata_prelude.status_code = 203_u16.try_into().expect("a status");
    response.metadata_prelude.headers.insert("x-made", "in pieces".parse().expect("a value"));
    response
}
