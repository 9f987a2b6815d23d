//! A way out, `allow.network = "egress"`: what goes through it, what doesn't, and what is left.
//!
//! Each test has a machine of its own: a network namespace for the node, one for the site behind
//! it with a real Redis, and a DNS server that only the node's own loopback reaches. Nothing
//! touches the network of the machine that runs the tests.

use super::http_function::{frozen, served};
use super::{SOON, alone, function, possible};
use crate::support::image::{build_with, shared};
use crate::support::{Node, TestDir, have, tied, wait_until};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// The site's Redis, by its addresses: on the site's network, where clouds have their metadata,
/// and as a container beside the node.
const REDIS: &str = "10.99.0.2";
const OTHER: &str = "10.99.0.3";
const METADATA: &str = "169.254.169.254";
const CONTAINER: &str = "172.30.0.2";
/// The node's own address at the site, and a Redis that listens on every address of the node.
const NODE: &str = "10.99.0.1";
const NODE_PORT: u16 = 6380;

/// Where dnsmasq and nft are, and not everybody's shell looks.
const SBIN: &str = "PATH=$PATH:/usr/sbin:/sbin; ";

/// Asks a Redis, with nothing but busybox; one word for each that is asked.
const ASK: &str = r#"ask() { printf 'PING\r\nQUIT\r\n' | timeout 20 nc $1 $2 2>/dev/null | head -n 1 | grep -q PONG && echo "$3 yes" || echo "$3 no"; }
"#;

/// Runs `test` in namespaces of its own: network and mounts are a thread's.
fn in_a_machine(name: &str, test: impl FnOnce(&mut Machine) + Send) {
    let programs = ["ip", "nft", "nsenter", "dnsmasq", "redis-server", "redis-cli"];
    if !possible() || !programs.iter().all(|program| have(name, program)) {
        return;
    }
    let name = name.to_owned();
    let ran = std::thread::scope(|scope| {
        scope
            .spawn(move || {
                nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
                    .expect("root may have namespaces");
                test(&mut Machine::new(&name));
            })
            .join()
    });
    if let Err(panic) = ran {
        std::panic::resume_unwind(panic);
    }
}

struct Machine {
    children: Vec<Child>,
    site: String,
    _dir: TestDir,
}

impl Machine {
    fn new(name: &str) -> Self {
        const NONE: Option<&str> = None;
        nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
            .expect("private mounts");
        let dir = TestDir::new(&format!("{name}-machine"));
        let resolv = dir.write("resolv.conf", "nameserver 127.0.0.53\n");
        let at = std::fs::canonicalize("/etc/resolv.conf").unwrap_or_else(|_| "/etc/resolv.conf".into());
        if !at.exists() {
            std::fs::write(&at, "").expect("a file to mount on");
        }
        nix::mount::mount(Some(&resolv), &at, NONE, MsFlags::MS_BIND, NONE).expect("bind resolv.conf");
        run("ip link set lo up");
        std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "0").expect("forwarding is off");

        let holder = tied("unshare")
            .args(["--net", "--", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .expect("start the site");
        let site = holder.id().to_string();
        let ours = std::fs::read_link("/proc/thread-self/ns/net").expect("a network");
        wait_until(SOON, "the site has a network of its own", || {
            std::fs::read_link(format!("/proc/{site}/ns/net")).is_ok_and(|theirs| theirs != ours)
        });
        let mut machine = Self { children: vec![holder], site, _dir: dir };
        machine.wire();
        machine.serve();
        machine
    }

    /// node ── wan ── site, and node ── docker0 ── site.
    fn wire(&self) {
        let site = &self.site;
        for line in [
            format!("ip link add wan type veth peer name lan netns {site}"),
            "ip link add docker0 type bridge".to_owned(),
            format!("ip link add box type veth peer name box netns {site}"),
            "ip link set box master docker0".to_owned(),
            format!("ip address add {NODE}/24 dev wan"),
            "ip address add 172.30.0.1/24 dev docker0".to_owned(),
            "ip link set wan up".to_owned(),
            "ip link set box up".to_owned(),
            "ip link set docker0 up".to_owned(),
            format!("ip route add default via {REDIS}"),
            format!("ip route add {METADATA} dev wan"),
        ] {
            run(&line);
        }
        for line in [
            "ip link set lo up".to_owned(),
            format!("ip address add {REDIS}/24 dev lan"),
            format!("ip address add {OTHER}/24 dev lan"),
            format!("ip address add {METADATA}/32 dev lan"),
            format!("ip address add {CONTAINER}/24 dev box"),
            "ip link set lan up".to_owned(),
            "ip link set box up".to_owned(),
        ] {
            run(&self.at_site(&line));
        }
    }

    fn serve(&mut self) {
        let redis = |port: u16| {
            format!(
                "redis-server --port {port} --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --logfile /dev/null"
            )
        };
        let dns = format!(
            "dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --no-daemon --user=root --pid-file \
             --listen-address=127.0.0.53 --bind-interfaces --address=/redis.site/{REDIS} --address=/other.site/{OTHER} \
             --address=/node.site/{NODE} --address=/metadata.site/{METADATA} --txt-record=data.site,word"
        );
        let lines = [self.at_site(&redis(6379)), self.at_site(&redis(7000)), redis(NODE_PORT), dns];
        for line in &lines {
            let mut command = tied("sh");
            command.args(["-c", &format!("{SBIN}exec {line}")]).stdin(Stdio::null());
            command.stdout(Stdio::null()).stderr(Stdio::null());
            self.children.push(command.spawn().expect("start a server"));
        }
        for (host, port) in
            [(REDIS, 6379), (OTHER, 7000), (METADATA, 6379), (CONTAINER, 6379), (NODE, NODE_PORT)]
        {
            wait_until(SOON, &format!("{host}:{port} answers the node"), || {
                std::net::TcpStream::connect((host, port)).is_ok()
            });
        }
        wait_until(SOON, "names are answered", || std::net::TcpStream::connect(("127.0.0.53", 53)).is_ok());
    }

    /// Another network behind the node, 10.98.0.2 and fd00:98::2: a process that is there.
    fn neighbour(&mut self) -> String {
        let holder = tied("unshare")
            .args(["--net", "--", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .expect("start the neighbour");
        let pid = holder.id().to_string();
        self.children.push(holder);
        let ours = std::fs::read_link("/proc/thread-self/ns/net").expect("a network");
        wait_until(SOON, "the neighbour has a network of its own", || {
            std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|theirs| theirs != ours)
        });
        run(&format!("ip link add plant type veth peer name far netns {pid}"));
        for line in ["address add 10.98.0.1/24 dev plant", "link set plant up"] {
            run(&format!("ip {line}"));
        }
        for line in ["address add 10.98.0.2/24 dev far", "link set far up", "route add default via 10.98.0.1"]
        {
            run(&format!("nsenter --net=/proc/{pid}/ns/net ip {line}"));
        }
        run(&self.at_site(&format!("ip route add 10.98.0.0/24 via {NODE}")));
        pid
    }

    fn reaches(&self, address: &str) -> bool {
        let address: std::net::SocketAddr = address.parse().expect("an address");
        let connect = || std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(2));
        within(&self.site, || connect().is_ok())
    }

    fn at_site(&self, line: &str) -> String {
        format!("nsenter --net=/proc/{}/ns/net {line}", self.site)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[track_caller]
fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", &format!("{SBIN}{line}")]).output().expect("run sh");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line}: {out}{err}");
    out.into_owned()
}

/// Opens a socket in another process's network, where it stays.
fn within<T: Send>(pid: &str, open: impl FnOnce() -> T + Send) -> T {
    let network = std::fs::File::open(format!("/proc/{pid}/ns/net")).expect("a network");
    std::thread::scope(|scope| {
        let opened = scope.spawn(move || {
            nix::sched::setns(network, CloneFlags::CLONE_NEWNET).expect("entered");
            open()
        });
        opened.join().expect("opened")
    })
}

/// A process of a function's only instance.
fn instance(function: &str) -> String {
    let processes = std::fs::read_dir("/proc").expect("readable").flatten();
    let names = processes.map(|process| process.file_name().to_string_lossy().into_owned());
    let mut pids = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let is_inside = |pid: &String| {
        std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(function))
    };
    pids.find(is_inside).unwrap_or_else(|| panic!("no process of {function}"))
}

/// `vethneap…` interfaces, routes of neap's, tables of rules: what a way out consists of, a line each.
fn traces() -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for (line, word) in [
        ("ip -o link", "neap"),
        ("ip route show table all", "unreachable 10.213."),
        ("ip route show table all", "unreachable 0.0.0."),
        ("nft list tables", "neap"),
    ] {
        found.extend(run(line).lines().filter(|line| line.contains(word)).map(str::to_owned));
    }
    found
}

fn forwards(interface: &str) -> bool {
    // Below /proc/sys/net each thread sees its own network.
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/forwarding");
    std::fs::read_to_string(path).expect("readable").trim() == "1"
}

/// A manifest with a way out, to what `to` lists.
fn outwards(name: &str, script: &str, to: &str) -> String {
    function(name, &format!("{ASK}{script}"), &format!("[allow]\nnetwork = \"egress\"\n{to}\n"))
}

#[test]
fn a_way_out_leads_to_the_site_and_not_to_the_node_its_containers_or_link_local_hosts() {
    in_a_machine("wide", |_| {
        let node = alone("wide");
        let everywhere = format!(
            "ask {REDIS} 6379 site; ask redis.site 6379 name; ask {OTHER} 7000 other; ask {NODE} {NODE_PORT} node; \
             ask {CONTAINER} 6379 container; ask {METADATA} 6379 metadata; ask 127.0.0.1 {NODE_PORT} loopback; \
             gateway=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); echo ${{gateway%.*.*}}; \
             ask $gateway {NODE_PORT} gateway"
        );
        node.deploy(&outwards("wide", &everywhere, ""));
        node.deploy(&function("none", &format!("{ASK}ask {REDIS} 6379 site; ip -o link | wc -l"), ""));

        let said = node.post("/function/wide", "").text();
        let expected = "site yes\nname yes\nother yes\nnode no\ncontainer no\nmetadata no\nloopback no\n10.213\ngateway no\n";
        assert_eq!(said, expected);
        assert_eq!(node.post("/function/none", "").text(), "site no\n1\n");
    });
}

#[test]
fn to_lets_named_hosts_and_ports_through_and_nothing_else() {
    in_a_machine("narrow", |_| {
        let node = alone("narrow");
        let script = format!(
            "ask {REDIS} 6379 redis; ask {REDIS} 7000 port; ask {OTHER} 6379 host; ask {OTHER} 7000 both; \
             ask {NODE} {NODE_PORT} node; ask {METADATA} 6379 metadata"
        );
        for (name, to, expected) in [
            (
                "host-port",
                format!("{REDIS}:6379"),
                "redis yes\nport no\nhost no\nboth no\nnode no\nmetadata no\n",
            ),
            ("host", OTHER.to_owned(), "redis no\nport no\nhost yes\nboth yes\nnode no\nmetadata no\n"),
            (
                "net",
                "10.99.0.0/24:7000".to_owned(),
                "redis no\nport yes\nhost no\nboth yes\nnode no\nmetadata no\n",
            ),
            (
                "udp",
                format!("{REDIS}:6379/udp"),
                "redis no\nport no\nhost no\nboth no\nnode no\nmetadata no\n",
            ),
            // What is off limits for a network is there for those who have its address.
            (
                "all",
                "0.0.0.0/0".to_owned(),
                "redis yes\nport yes\nhost yes\nboth yes\nnode no\nmetadata no\n",
            ),
            (
                "node",
                format!("{NODE}:{NODE_PORT}"),
                "redis no\nport no\nhost no\nboth no\nnode yes\nmetadata no\n",
            ),
            ("meta", METADATA.to_owned(), "redis no\nport no\nhost no\nboth no\nnode no\nmetadata yes\n"),
        ] {
            node.deploy(&outwards(name, &script, &format!("to = [\"{to}\"]")));
            assert_eq!(node.post(&format!("/function/{name}"), "").text(), expected, "{name}");
        }
    });
}

#[test]
fn a_name_leads_where_the_nodes_resolver_says_and_no_other_name_is_answered() {
    in_a_machine("names", |_| {
        let node = alone("names");
        let script = format!(
            "ask redis.site 6379 name; ask {REDIS} 6379 address; ask redis.site 7000 port; ask other.site 7000 other; \
             ask node.site {NODE_PORT} node; ask metadata.site 6379 metadata; \
             nslookup other.site >/dev/null 2>&1 && echo found || echo refused; \
             nslookup -type=txt data.site 2>/dev/null | grep -c word; true"
        );
        let to = "to = [\"Redis.site:6379\", \"node.site\", \"metadata.site\"]";
        node.deploy(&outwards("named", &script, to));
        node.deploy(&outwards(
            "open",
            "nslookup -type=txt data.site 2>/dev/null | grep -c word; cat /etc/resolv.conf",
            "",
        ));
        node.deploy(&outwards(
            "nameless",
            &format!("ask {REDIS} 6379 address; nslookup redis.site 2>&1 | grep -q {REDIS} && echo found || echo none"),
            &format!("to = [\"{REDIS}\"]"),
        ));

        let said = node.post("/function/named", "").text();
        let expected = "name yes\naddress yes\nport no\nother no\nnode no\nmetadata no\nrefused\n0\n";
        assert_eq!(said, expected);
        assert_eq!(node.post("/function/open", "").text(), "1\nnameserver 127.0.0.11\n");
        assert_eq!(node.post("/function/nameless", "").text(), "address yes\nnone\n");
    });
}

#[test]
fn an_image_with_redis_cli_in_it_talks_to_the_sites_redis() {
    in_a_machine("foreign", |_| {
        let node = alone("foreign");
        let archive = redis_image().to_str().expect("UTF-8");
        node.neap_ok(&["image", "import", archive, "--name", "redis:1"]);
        let manifest =
            outwards("counter", "redis-cli -h redis.site INCR events", "to = [\"redis.site:6379\"]");
        let manifest = manifest.replace("shell:1", "redis:1").replace("16MiB", "64MiB");
        node.deploy(&format!("{manifest}[scale]\nmin = 1\n"));
        node.wait_parked("counter", 1);

        for count in 1..=3 {
            assert_eq!(node.post("/function/counter", "").text(), format!("{count}\n"));
        }
    });
}

#[test]
fn servers_have_a_way_out_and_neither_reach_nor_are_reached_by_others() {
    in_a_machine("servers", |machine| {
        let node = alone("servers");
        let script = format!(
            "{ASK}printf 'Content-Type: text/plain\\r\\n\\r\\n'; ask {REDIS} 6379 site; \
             ip -4 -o address show eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'"
        );
        node.deploy(&served("server", &script, "[allow]\nnetwork = \"egress\"\n"));
        let call = || node.post("/function/server/cgi-bin/f", "").text();
        let answer = call();
        wait_until(SOON, "the idle instance is frozen", || frozen(&node) == Some(true));
        assert_eq!(call(), answer, "thawed, it has its way and its address");
        let mut lines = answer.lines();
        assert_eq!(lines.next(), Some("site yes"), "{answer}");
        let address = lines.next().unwrap_or_default().to_owned();
        assert!(address.starts_with("10.213."), "{answer}");

        // One that answers, whatever the function does: it is frozen again.
        let server = instance("server");
        let listener = within(&server, || std::net::TcpListener::bind("0.0.0.0:8090").expect("bound"));
        std::thread::spawn(move || {
            for knocking in listener.incoming().flatten() {
                let _ = std::io::Write::write_all(&mut &knocking, b"HTTP");
            }
        });
        let port = |host: &str| std::net::TcpStream::connect((host, 8090)).is_ok();
        assert!(within(&server, || port(&address) && port("127.0.0.1")), "it listens at its address");

        let knock = format!(
            "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 nc {address} 8090 2>/dev/null | head -c 4 | grep -q HTTP && echo in || echo out"
        );
        node.deploy(&outwards("other", &knock, ""));
        node.deploy(&outwards("named", &knock, &format!("to = [\"{address}\"]")));
        for name in ["other", "named"] {
            assert_eq!(node.post(&format!("/function/{name}"), "").text(), "out\n", "{name}");
        }
        run(&machine.at_site(&format!("ip route add 10.213.0.0/16 via {NODE}")));
        let knock = knock.replace('\'', "\"").replace("nc ", "busybox nc ");
        assert_eq!(run(&machine.at_site(&format!("sh -c '{knock}'"))), "out\n");
        assert_eq!(run(&format!("sh -c '{knock}'")), "out\n", "nor the node itself");
    });
}

#[test]
fn lambda_functions_have_their_runtime_api_beside_a_way_out() {
    in_a_machine("lambda-out", |_| {
        let node = alone("lambda-out");
        let script = format!(
            "{ASK}api=http://$AWS_LAMBDA_RUNTIME_API/2018-06-01/runtime/invocation\n\
             while :; do\n\
             id=$(wget -S -O /dev/null $api/next 2>&1 | grep -i aws-request-id | sed 's/.*: *//' | tr -d '\\r')\n\
             said=$(ask redis.site 6379 site)\n\
             wget -q -O /dev/null --post-data \"\\\"$said\\\"\" $api/$id/response\n\
             done"
        );
        let rest = "platform = \"lambda\"\n[allow]\nnetwork = \"egress\"\nto = [\"redis.site:6379\"]";
        node.deploy(&function("f", &script, rest).replace("16MiB", "128MiB"));

        for _ in 0..2 {
            assert_eq!(node.post("/function/f", "{}").text(), "\"site yes\"");
        }
    });
}

#[test]
fn nothing_is_left_of_a_way_out_when_nobody_needs_it_and_after_a_kill() {
    in_a_machine("traces", |_| {
        let mut node = alone("traces");
        assert_eq!(traces(), Vec::<String>::new());
        node.deploy(&format!("{}[scale]\nmin = 2\n", outwards("parked", "ask redis.site 6379 site", "")));
        node.wait_parked("parked", 2);
        assert!(traces().len() >= 4 && forwards("wan"), "{:?}", traces());
        assert!(!forwards("all") && !forwards("docker0"), "nothing else is turned on");

        node.neap_ok(&["rm", "parked"]);
        wait_until(SOON, "nothing is left", || traces().is_empty());
        assert!(!forwards("wan"), "what was turned on is turned off");

        node.deploy(&outwards("again", "ask redis.site 6379 site", ""));
        assert_eq!(node.post("/function/again", "").text(), "site yes\n");
        node.kill();
        wait_until(SOON, "the launcher leaves nothing", || traces().is_empty() && !forwards("wan"));
        node.start();
        assert_eq!(node.post("/function/again", "").text(), "site yes\n");

        // Both at once: nobody is there to sweep.
        node.signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(node.kill_launcher(usize::MAX), "there is a launcher");
        let tables = run("nft list tables");
        let is_there = tables.lines().any(|line| line.contains("neap") && !line.contains("guard"));
        assert!(is_there, "the daemon keeps the rules until instances have ended: {tables}");
        node.kill();
        // Until somebody starts it again nothing is forwarded but to instances, which are gone; the
        // rules may be there, as nobody's.
        assert!(forwards("wan") && run("nft list tables").contains("guard"), "{:?}", traces());
        node.start();
        assert_eq!(node.post("/function/again", "").text(), "site yes\n");
        assert!(node.kill_launcher(usize::MAX), "there is a launcher");
        wait_until(SOON, "another launcher runs it", || {
            node.post("/function/again", "").text() == "site yes\n"
        });

        // Somebody turns forwarding on for all: it stays, and the guard goes.
        std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "1").expect("turned on");
        wait_until(SOON, "the guard is gone", || !traces().iter().any(|line| line.contains("guard")));
        node.stop();
        wait_until(SOON, "nothing is left", || traces().is_empty());
        assert!(forwards("all") && forwards("wan"), "what others need stays on");
    });
}

#[test]
fn two_nodes_have_ways_out_beside_each_other_and_a_taken_range_is_told() {
    in_a_machine("two", |_| {
        let (one, two) = (alone("one"), alone("two"));
        for node in [&one, &two] {
            node.deploy(&outwards("ask", "ask redis.site 6379 site", ""));
        }
        for node in [&one, &two, &one] {
            assert_eq!(node.post("/function/ask", "").text(), "site yes\n");
        }
        drop(one);
        wait_until(SOON, "the other still has its way", || {
            two.post("/function/ask", "").text() == "site yes\n"
        });

        let taken = Node::builder("taken").node_line("egress_range = \"10.99.0.0/24\"").start();
        taken.import(crate::support::shell_image());
        let file = taken.dir().write("ask.toml", outwards("ask", "true", ""));
        let refused = taken.neap(&["deploy", file.to_str().expect("UTF-8")]);
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && told.contains("egress_range"), "{told}");
        assert!(told.contains("allow.network") && !told.contains("image"), "{told}");
        assert!(told.contains("10.99.0.0/24 is routed by this machine already"), "{told}");
        taken.deploy(&function("plain", "echo runs", ""));
        assert_eq!(taken.post("/function/plain", "").text(), "runs\n");
    });
}

#[test]
fn who_sends_in_anothers_name_is_not_heard_whatever_rp_filter_says() {
    in_a_machine("spoof", |machine| {
        let node = alone("spoof");
        // As systemd's 50-default.conf has it: of this and the interface's own, the larger counts.
        std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "2").expect("written");
        node.deploy(&format!("{}[scale]\nmin = 1\n", outwards("spoof-open", "true", "")));
        let to = format!("to = [\"{OTHER}\"]");
        node.deploy(&format!("{}[scale]\nmin = 1\n", outwards("spoof-shut", "true", &to)));
        node.wait_parked("spoof-open", 1);
        node.wait_parked("spoof-shut", 1);
        let (open, shut) = (instance("spoof-open"), instance("spoof-shut"));
        let inside = |pid: &str, line: &str| run(&format!("nsenter --net=/proc/{pid}/ns/net {line}"));
        let shown = inside(&open, "ip -4 -o address show eth0");
        let address =
            shown.split_whitespace().nth(3).and_then(|net| net.split('/').next()).expect("an address");
        let site = within(&machine.site, || std::net::UdpSocket::bind((REDIS, 9999)).expect("bound"));
        site.set_read_timeout(Some(SOON)).expect("set");

        inside(&shut, &format!("ip address add {address}/32 dev eth0"));
        for (pid, word) in [(&shut, "spoofed"), (&open, "own")] {
            let socket = within(pid, || std::net::UdpSocket::bind((address, 0)).expect("bound"));
            let _ = socket.send_to(word.as_bytes(), (REDIS, 9999)); // being refused is fine
        }

        let mut heard = [0; 16];
        let length = site.recv(&mut heard).expect("somebody is heard");
        assert_eq!(String::from_utf8_lossy(&heard[..length]), "own");

        // Whoever asks for the node's hardware address, by whatever name, is not taken note of.
        let gateway = inside(&open, "ip -o route show default");
        let gateway = gateway.split_whitespace().nth(2).expect("a gateway");
        let hardware = inside(&open, &format!("ip neighbour show {gateway} dev eth0 nud permanent"));
        let hardware = hardware.split_whitespace().nth(2).expect("a hardware address");
        for n in 1..=3 {
            inside(&open, &format!("ip address add 10.77.0.{n}/32 dev eth0"));
            inside(&open, &format!("ip neighbour del {gateway} dev eth0 || true"));
            let socket =
                within(&open, || std::net::UdpSocket::bind((format!("10.77.0.{n}"), 0)).expect("bound"));
            socket.send_to(b"who", (gateway, 9)).expect("sent");
        }
        let asked = || inside(&open, &format!("ip neighbour show {gateway}"));
        wait_until(SOON, "nobody has answered", || asked().contains("FAILED"));
        let noted = run("ip neighbour show");
        assert!(noted.contains(address) && !noted.contains("10.77.0."), "{noted}");
        inside(&open, &format!("ip neighbour replace {gateway} lladdr {hardware} dev eth0 nud permanent"));

        // A line that somebody renames is still one: what it may not reach it doesn't.
        let node_itself = std::net::UdpSocket::bind((NODE, 9999)).expect("bound");
        node_itself.set_read_timeout(Some(SOON)).expect("set");
        let line = run(&format!("ip -o route get {address}"));
        let line = line.split_whitespace().skip_while(|word| *word != "dev").nth(1).expect("its line");
        run(&format!("ip link set {line} down && ip link set {line} name other && ip link set other up"));
        wait_until(SOON, "the line is up again", || {
            let shown = [run("ip -o link show other"), inside(&open, "ip -o link show eth0")];
            shown.iter().all(|shown| shown.contains("state UP"))
        });
        // Gone with the line's being down; without it the source is nobody's, and not heard for that.
        run(&format!("ip route add {address} dev other"));
        let socket = within(&open, || std::net::UdpSocket::bind((address, 0)).expect("bound"));
        let _ = socket.send_to(b"renamed", (NODE, 9999));
        let own = std::net::UdpSocket::bind((NODE, 0)).expect("bound");
        own.send_to(b"node", (NODE, 9999)).expect("sent");
        let length = node_itself.recv(&mut heard).expect("somebody is heard");
        assert_eq!(String::from_utf8_lossy(&heard[..length]), "node");
    });
}

#[test]
fn an_instance_has_so_many_connections_and_no_more_and_others_have_theirs() {
    in_a_machine("many", |_| {
        let node = alone("many");
        for name in ["greedy", "modest"] {
            node.deploy(&format!("{}[scale]\nmin = 1\n", outwards(name, "ask redis.site 6379 site", "")));
            node.wait_parked(name, 1);
        }
        let (greedy, modest) = (instance("greedy"), instance("modest"));
        let connect = || std::net::TcpStream::connect((REDIS, 6379));
        let sysctl = |name: &str| PathBuf::from(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
        let tracked = || -> usize {
            let text = std::fs::read_to_string(sysctl("count")).expect("readable");
            text.trim().parse().expect("a number")
        };
        std::fs::write(sysctl("udp_timeout"), "600").expect("written");

        // Packets that nobody answers are one connection, however many they are.
        let send = |ports: &mut dyn Iterator<Item = u16>| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bound");
            for port in ports {
                let _ = socket.send_to(b"unheard", (OTHER, port)); // being refused is fine
            }
        };
        within(&modest, || send(&mut std::iter::repeat_n(20_000, 2000)));
        let before = tracked();
        within(&greedy, || send(&mut (20_000..22_000)));

        // A sixteenth of what the node tracks, 512 at most; and a few of others.
        let more = tracked().saturating_sub(before);
        assert!((32..=512 + 32).contains(&more), "{more}");
        assert!(within(&greedy, connect).is_err(), "no more");
        let other = within(&modest, connect);
        assert!(other.is_ok(), "{other:?}");
    });
}

#[test]
fn a_firewall_that_drops_what_functions_send_is_told_with_what_helps() {
    in_a_machine("firewall", |_| {
        let node = alone("firewall");
        run(
            "nft 'add table inet site; add chain inet site onward { type filter hook forward priority 0; policy drop; }'",
        );
        let file = node.dir().write("walled.toml", outwards("walled", "ask redis.site 6379 site", ""));
        let deploy = || {
            let done = node.neap(&["deploy", file.to_str().expect("UTF-8")]);
            assert!(done.status.success());
            String::from_utf8_lossy(&done.stderr).into_owned()
        };
        let doctor = || String::from_utf8_lossy(&node.neap(&["doctor"]).stdout).into_owned();

        let told = deploy();
        assert!(told.contains("warning: walled: the firewall's chain inet site onward drops"), "{told}");
        assert!(node.status()["warnings"].to_string().contains("inet site onward"), "{}", node.status());
        assert!(doctor().contains("the firewall's chain inet site onward drops"), "{}", doctor());
        assert_eq!(node.post("/function/walled", "").text(), "site no\n");

        for rule in told.split('`').filter(|part| part.starts_with("nft insert")) {
            run(&format!("{} '{}'", &rule[..3], &rule[4..]));
        }
        assert_eq!(node.post("/function/walled", "").text(), "site yes\n");
        assert_eq!(deploy(), "");
        assert!(!doctor().contains("onward"), "{}", doctor());
    });
}

#[test]
fn all_that_runs_ends_with_a_node_that_is_killed_whole_and_none_is_ever_without_rules() {
    in_a_machine("whole", |_| {
        let node_itself = std::net::UdpSocket::bind((NODE, 9999)).expect("bound");
        node_itself.set_nonblocking(true).expect("set");
        let mut node = alone("whole");
        // Never heard: what listens on the node is refused.
        let knock = format!("while :; do echo x | timeout 1 nc -u {NODE} 9999 >/dev/null 2>&1; done");
        let long = |manifest: String| manifest.replace("memory =", "timeout = \"1h\"\nmemory =");
        node.deploy(&long(outwards("knocking", &knock, "")));
        node.deploy(&long(function("shut", "sleep 600", "")));
        node.deploy(&long(function("host", "sleep 600", "[allow]\nnetwork = \"host\"")));
        let served =
            served("busy", "sleep 600", "[allow]\nnetwork = \"egress\"\n[limits]\ntimeout = \"1h\"\n");
        node.deploy(&served);
        node.deploy(&format!("{}[scale]\nmin = 1\n", function("parked", "true", "")));
        node.wait_parked("parked", 1);
        for name in ["knocking", "shut", "host"] {
            let called = node.post(&format!("/async-function/{name}"), "");
            assert_eq!(called.status, 202, "{name}");
        }
        let port = node.port();
        std::thread::spawn(move || {
            let mut call = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
            let _ = std::io::Write::write_all(
                &mut call,
                b"GET /function/busy/cgi-bin/f HTTP/1.1\r\nHost: neap\r\n\r\n",
            );
            let _ = std::io::Read::read(&mut call, &mut [0]);
        });
        let running = || -> Vec<PathBuf> {
            let processes = node.instance_processes();
            processes.into_iter().map(|(_, pid)| PathBuf::from(format!("/proc/{pid}"))).collect()
        };
        // Five first processes, and what sleeps in three of them and in the server's script.
        wait_until(SOON, "all run", || running().len() >= 9);
        let left = running();

        node.signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(node.kill_launcher(usize::MAX), "there is a launcher");
        node.kill();

        let alive = |process: &PathBuf| {
            let state = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
            let state = state.rsplit(')').next().and_then(|rest| rest.trim().chars().next());
            !matches!(state, None | Some('Z' | 'X'))
        };
        wait_until(SOON, "all has ended", || !left.iter().any(alive));
        let tables = run("nft list tables");
        if tables.lines().any(|line| line.contains("neap") && !line.contains("guard")) {
            assert!(node_itself.recv(&mut [0; 16]).is_err(), "the rules outlived all that ran");
        } else {
            eprintln!("skipped: this kernel (before 6.9) ends rules with their owner");
        }
        node.start();
    });
}

#[test]
fn a_node_that_forwards_for_functions_is_no_router_and_stays_none_after_a_flush() {
    in_a_machine("flush", |machine| {
        let neighbour = machine.neighbour();
        let _plant = within(&neighbour, || std::net::TcpListener::bind("10.98.0.2:9").expect("bound"));
        let mut node = alone("flush");
        node.deploy(&format!("{}[scale]\nmin = 1\n", outwards("flushed", "ask redis.site 6379 site", "")));
        node.wait_parked("flushed", 1);
        assert!(forwards("wan") && forwards("plant"), "{:?}", traces());
        assert!(!machine.reaches("10.98.0.2:9"), "from the site to its neighbour");

        run("nft flush ruleset");
        assert!(!machine.reaches("10.98.0.2:9"), "nobody can flush that");
        wait_until(SOON, "the guard is made again", || run("nft list tables").contains("guard"));
        assert_eq!(node.post("/function/flushed", "").text(), "site yes\n");

        // A router by somebody's decision, and then no more: the lines that there are work on.
        std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "1").expect("turned on");
        wait_until(SOON, "a router", || machine.reaches("10.98.0.2:9"));
        std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", "0").expect("turned off");
        let lines = || -> Vec<String> {
            let shown = run("ip -o link");
            let names = shown.lines().filter_map(|line| line.split([':', '@']).nth(1));
            names.map(|name| name.trim().to_owned()).filter(|name| name.contains("neap")).collect()
        };
        wait_until(SOON, "lines are open again", || {
            let lines = lines();
            forwards("wan") && !lines.is_empty() && lines.iter().all(|line| forwards(line))
        });
        assert!(!machine.reaches("10.98.0.2:9"), "no router again");

        // Nobody is there to sweep, and the record isn't among the rules.
        node.signal(nix::sys::signal::Signal::SIGSTOP);
        assert!(node.kill_launcher(usize::MAX), "there is a launcher");
        node.kill();
        run("nft flush ruleset");
        node.start();
        node.neap_ok(&["rm", "flushed"]);
        wait_until(SOON, "nothing is left", || traces().is_empty());
        assert!(!forwards("wan") && !forwards("plant"), "what was turned on is turned off");
    });
}

#[test]
fn what_the_node_routes_by_ipv6_is_left_alone() {
    let all = Path::new("/proc/sys/net/ipv6/conf/all/forwarding");
    if !all.exists() {
        eprintln!("skipped: no IPv6");
        return;
    }
    in_a_machine("six", |machine| {
        let neighbour = machine.neighbour();
        std::fs::write(all, "1").expect("an IPv6 router");
        let site = machine.site.clone();
        run("ip address add fd00:99::1/64 dev wan nodad");
        run("ip address add fd00:98::1/64 dev plant nodad");
        for (pid, line) in [
            (&site, "address add fd00:99::2/64 dev lan nodad"),
            (&site, "route add fd00:98::/64 via fd00:99::1"),
            (&neighbour, "address add fd00:98::2/64 dev far nodad"),
            (&neighbour, "-6 route add default via fd00:98::1"),
        ] {
            run(&format!("nsenter --net=/proc/{pid}/ns/net ip {line}"));
        }
        let _plant = within(&neighbour, || std::net::TcpListener::bind("[fd00:98::2]:9").expect("bound"));
        wait_until(SOON, "routed", || machine.reaches("[fd00:98::2]:9"));

        let node = alone("six");
        node.deploy(&format!("{}[scale]\nmin = 1\n", outwards("beside", "true", "")));
        node.wait_parked("beside", 1);

        assert!(forwards("plant") && machine.reaches("[fd00:98::2]:9"));
    });
}

/// The shell image with Debian's redis-cli and what it is linked with.
fn redis_image() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let dir = TestDir::new("redis-image");
        let root = dir.join("root");
        run(&format!(
            "mkdir -p {0}/usr/local/bin && cp -L $(command -v redis-cli) {0}/bin.tmp && \
             for f in $(ldd $(command -v redis-cli) | grep -o '/[^ ]*'); do mkdir -p {0}$(dirname $f) && cp -L $f {0}$f; done && \
             mkdir -p {0}/bin && mv {0}/bin.tmp {0}/bin/redis-cli && rm -r {0}/usr/local",
            root.display()
        ));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/shell/build.sh");
        shared("redis", |archive| build_with(Command::new(script).arg(archive).arg(&root)))
    })
}
