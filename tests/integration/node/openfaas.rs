//! OpenFaaS's contract for functions, with a server in the container that keeps it.

use super::{SOON, alone, possible};
use crate::support::{http, wait_until};

/// One request at a time, as with `max_inflight=1`: 429 beyond, from the function and from its
/// readiness. Each is at work until the gate is open.
const ONE_AT_A_TIME: &str = r#"mkdir -p /tmp/www/cgi-bin; echo "*.sh:/bin/sh" >/tmp/httpd.conf; cd /tmp/www/cgi-bin
cat >work.sh <<END
mkdir /tmp/busy 2>/dev/null || { echo full >&2; echo "Status: 429 Too Many Requests"; echo; exit; }
echo begun >&2
until grep -q open /var/openfaas/secrets/gate; do sleep 0.1; done
rmdir /tmp/busy
echo finished >&2
echo "Content-Type: text/plain"
echo
echo done
END
cat >ready.sh <<END
[ -d /tmp/busy ] && echo "Status: 429 Too Many Requests" || echo "Content-Type: text/plain"
echo
END
chmod +x *.sh
exec httpd -f -p 8080 -h /tmp/www -c /tmp/httpd.conf"#;

#[test]
fn instance_that_is_full_gets_nothing_and_work_waits_or_has_another() {
    if !possible() {
        return;
    }
    let node = alone("full");
    node.neap_ok(&["secret", "set", "gate", "--data", "closed"]);
    node.deploy(&format!(
        "name = \"f\"\nimage = \"shell:1\"\nplatform = \"openfaas\"\nready = \"/cgi-bin/ready.sh\"\n\
         secrets = [\"gate\"]\ncommand = ['/bin/sh', '-c', '''{ONE_AT_A_TIME}''']\n\
         [scale]\nmax = 2\nconcurrency = 2\n[limits]\ntimeout = \"300s\"\n[retry]\nattempts = 1\n"
    ));
    let port = node.port();
    let work = "/function/f/cgi-bin/work.sh";
    let log = |word: &str| node.neap_ok(&["logs", "f", "--tail", "1000"]).matches(word).count();

    let first = std::thread::spawn(move || http::get(port, work));
    wait_until(SOON * 2, "the first is at work", || log("begun") == 1);
    assert_eq!(node.get(work).status, 429, "a caller's request is gone with its answer");
    let event = || node.post("/async-function/f/cgi-bin/work.sh", "x").status;
    assert_eq!(event(), 202);
    wait_until(SOON * 2, "the event has another instance", || log("begun") == 2);
    assert_eq!(event(), 202);
    wait_until(SOON * 2, "the next has met both full", || log("full") == 2);
    node.neap_ok(&["secret", "set", "gate", "--data", "open"]);

    let first = first.join().expect("no panic").expect("an answer");
    assert_eq!((first.status, first.text().trim()), (200, "done"));
    wait_until(SOON * 2, "all of it is done", || log("finished") == 3);
    wait_until(SOON * 2, "no event is left", || {
        node.neap_json(&["events"]).as_array().is_some_and(Vec::is_empty)
    });
}
