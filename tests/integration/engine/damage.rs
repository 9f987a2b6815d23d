//! Pages of the database that go bad under a running node.

use super::{SOON, alone, function, possible};
use crate::support::{http, wait_until};
use std::os::unix::fs::FileExt;

const EVENTS: u64 = 1_000;

#[test]
fn database_that_goes_bad_under_a_running_node_is_salvaged_with_nobody_there() {
    if !possible() {
        return;
    }
    let mut node = alone("spoilt");
    node.deploy(&function("f", "cat >&2", "[[trigger]]\nevent = \"t\""));
    node.neap_ok(&["pause", "f"]);
    let batch = [("content-type", "application/cloudevents-batch+json")];
    for hundred in 0..EVENTS / 100 {
        let data = "x".repeat(3_000);
        let event = |n| {
            format!(
                r#"{{"specversion":"1.0","id":"{hundred}-{n}","source":"/s","type":"t","data":"{data}"}}"#
            )
        };
        let events = (0..100).map(event).collect::<Vec<_>>().join(",");
        let answer = http::request(node.port(), "POST", "/events", &batch, format!("[{events}]").as_bytes());
        assert_eq!(answer.expect("an answer").status, 202);
    }
    let daemon = node.daemon_pid();

    // Where it was written long ago, so that neither the cache nor the log of what is newer has it.
    let database = node.dir().join("data/neap.db");
    let file = std::fs::File::options().write(true).open(&database).expect("opens");
    let middle = file.metadata().expect("its size").len() / 4096 / 3 * 4096;
    file.write_all_at(&[0; 16 * 4096], middle).expect("spoils it");
    let _ = node.neap(&["events", "--function", "f", "--limit", "1000"]);

    wait_until(SOON, "it has started anew", || node.stderr().contains("were salvaged"));
    wait_until(SOON, "it serves again", || {
        http::get(node.port(), "/readyz").is_ok_and(|answer| answer.status == 200)
    });
    assert_eq!(node.daemon_pid(), daemon, "nobody started another");
    assert!(node.running());
    let status = node.status();
    assert!(status["warnings"].to_string().contains("the database was damaged"), "{status}");
    let depth = status["inbox"]["depth"].as_u64().expect("a number");
    assert!((EVENTS - 200..EVENTS).contains(&depth), "{status}");
    let one = http::request(node.port(), "POST", "/async-function/f", &[], b"one more");
    assert_eq!(one.expect("an answer").status, 202);
    assert_eq!(node.status()["inbox"]["depth"], depth + 1);
    assert!(!database.with_extension("db.suspected").exists());
    node.restart();
    assert_eq!(node.status()["inbox"]["depth"], depth + 1);
}
