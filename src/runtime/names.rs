//! Names for functions with a way out: the daemon answers, inside each instance's own network,
//! at an address of its loopback that /etc/resolv.conf names.
//!
//! Questions go on to the node's own resolvers, as /etc/resolv.conf on the node has them when the
//! question comes, also one that listens on the node's loopback alone (systemd-resolved, dnsmasq)
//! and that no instance could reach. So a function follows the node from network to network.
//!
//! Where `allow.to` has names, those are answered and no others, for their IPv4 addresses alone,
//! and what they lead to is let through before the function knows. No data leaves by questions.
//! IPv6 addresses are answered as if there were none, for there is no way to them.

use super::dns::{self, A, AAAA, Code, Question};
use super::egress::Found;
use crate::model::reach::Reach;
use futures_lite::{AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt};
use smol::net::{TcpStream, UdpSocket};
use smol::{Async, Timer};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Docker's is 127.0.0.11 too: programs that look for it find it.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// resolv.conf(5): MAXNS.
const RESOLVERS_MAX: usize = 3;
/// For one resolver to answer; programs wait 5 s for each try.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// For a whole question over TCP.
const CONNECTION_MAX: Duration = Duration::from_secs(10);
/// Before accepting again after an error.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Of one instance at once. More datagrams are dropped, and asked again by whoever sent them;
/// more connections wait.
const QUESTIONS_MAX: usize = 32;
/// Of all instances together: each is a socket of the daemon's and 8 KiB for a moment, and one
/// more for the node's resolver. More datagrams are dropped; by a connection they fail.
const QUESTIONS_OF_ALL_MAX: usize = 256;
/// RFC 6891 §6.2.5 has 4096 for datagrams.
const DATAGRAM_BYTES_MAX: usize = 4096;
const RESOLV_CONF: &str = "/etc/resolv.conf";
const PORT: u16 = 53;

/// Lets what a name led to through; false: it couldn't be.
type Admit = Box<dyn Fn(Vec<Found>) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

pub struct Names {
    to: Vec<Reach>,
    admit: Admit,
    asking: Count,
    /// Of all instances.
    asking_of_all: Count,
}

/// Questions on their way.
pub type Count = Arc<AtomicUsize>;

/// How a question is dealt with.
enum Way {
    Answer(Code),
    /// To the node's resolvers.
    PassOn,
    /// To them, and what the answer says is let through.
    Admit,
}

impl Names {
    /// `to`: empty is everywhere. `of_all`: shared by all instances.
    pub fn new<F>(
        to: Vec<Reach>,
        of_all: Count,
        admit: impl Fn(Vec<Found>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = bool> + Send + 'static,
    {
        let admit: Admit = Box::new(move |found| Box::pin(admit(found)));
        Self { to, admit, asking: Count::default(), asking_of_all: of_all }
    }

    /// Until dropped.
    pub async fn serve(self, (datagrams, connections): (Async<std::net::UdpSocket>, Async<TcpListener>)) {
        let names = Arc::new(self);
        let asking = smol::Executor::new();
        let by_datagram = async {
            let socket = UdpSocket::from(datagrams);
            let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let Some(turn) = names.turn() else { continue };
                let (names, socket, query) = (Arc::clone(&names), socket.clone(), buffer[..length].to_vec());
                let asked = async move {
                    let _turn = turn;
                    if let Some(answer) = names.answer(&query, false).await {
                        let _ = socket.send_to(&answer, from).await; // it may have gone
                    }
                };
                asking.spawn(asked).detach();
            }
        };
        let by_connection = async {
            let mut incoming = Box::pin(connections.incoming());
            while let Some(accepted) = incoming.next().await {
                let Ok(connection) = accepted else {
                    Timer::after(ACCEPT_PAUSE).await; // short of descriptors: others may close theirs
                    continue;
                };
                let answered = async {
                    let _ = names.converse(connection).await; // it may have gone
                };
                let late = async {
                    Timer::after(CONNECTION_MAX).await;
                };
                answered.or(late).await;
            }
        };
        asking.run(futures_lite::future::zip(by_datagram, by_connection)).await;
    }

    fn turn(&self) -> Option<[Turn; 2]> {
        let own = Turn::take(&self.asking, QUESTIONS_MAX)?;
        Some([own, Turn::take(&self.asking_of_all, QUESTIONS_OF_ALL_MAX)?])
    }

    /// One connection, its questions one after the other (RFC 1035 §4.2.2).
    async fn converse(&self, mut connection: Async<std::net::TcpStream>) -> io::Result<()> {
        loop {
            let query = read_message(&mut connection).await?;
            let Some(_turn) = self.turn() else { return Ok(()) };
            let Some(answer) = self.answer(&query, true).await else { return Ok(()) };
            write_message(&mut connection, &answer).await?;
        }
    }

    async fn answer(&self, query: &[u8], by_connection: bool) -> Option<Vec<u8>> {
        let question = match dns::question(query) {
            Ok(question) => question,
            Err(code) => return code.map(|code| dns::answer(query, None, code)),
        };
        let own = |code| Some(dns::answer(query, Some(&question), code));
        let way = self.way(&question);
        if let Way::Answer(code) = way {
            return own(code);
        }
        let Some(answer) = ask(query, &question, by_connection).await else {
            return own(Code::ServerFailure);
        };
        let found = if matches!(way, Way::Admit) { self.found(&question.name, &answer) } else { Vec::new() };
        if found.is_empty() || (self.admit)(found).await { Some(answer) } else { own(Code::ServerFailure) }
    }

    fn way(&self, Question { name, kind, .. }: &Question) -> Way {
        let is_open = self.to.is_empty();
        let is_named = is_open || self.to.iter().any(|reach| reach.names(name));
        match *kind {
            _ if !is_named => Way::Answer(Code::Refused),
            AAAA => Way::Answer(Code::NoError),
            _ if is_open => Way::PassOn,
            A => Way::Admit,
            // Also a program that asks for more than addresses goes on with those.
            _ => Way::Answer(Code::NoError),
        }
    }

    /// Addresses in an answer, each with the ports that the name is allowed.
    fn found(&self, name: &str, answer: &[u8]) -> Vec<Found> {
        let ports: Vec<_> =
            self.to.iter().filter(|reach| reach.names(name)).map(|reach| reach.port).collect();
        let addresses = dns::addresses(answer).into_iter();
        addresses.flat_map(|address| ports.iter().map(move |port| (address, *port))).collect()
    }
}

/// One of the questions that a count counts.
struct Turn(Count);

impl Turn {
    fn take(count: &Count, max: usize) -> Option<Self> {
        let turn = Self(Arc::clone(count));
        (count.fetch_add(1, Ordering::Relaxed) < max).then_some(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The first answer of the node's resolvers, asked one after the other.
async fn ask(query: &[u8], question: &Question, by_connection: bool) -> Option<Vec<u8>> {
    // A regular file, of a few lines.
    let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    for resolver in resolvers(&text) {
        let asked = async {
            match by_connection {
                true => ask_by_connection(query, resolver).await,
                false => ask_by_datagram(query, question, resolver).await,
            }
        };
        let late = async {
            Timer::after(ANSWER_MAX).await;
            Err(io::ErrorKind::TimedOut.into())
        };
        match asked.or(late).await {
            Ok(answer) if dns::answers(&answer, query, question) => return Some(answer),
            _ => {} // the next may know
        }
    }
    None
}

/// From a port that nobody can guess, one for each question.
async fn ask_by_datagram(query: &[u8], question: &Question, resolver: SocketAddr) -> io::Result<Vec<u8>> {
    let unspecified: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((unspecified, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if dns::answers(&buffer[..length], query, question) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_by_connection(query: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
    let mut connection = TcpStream::connect(resolver).await?;
    write_message(&mut connection, query).await?;
    read_message(&mut connection).await
}

async fn read_message(from: &mut (impl smol::io::AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    from.read_exact(&mut length).await?;
    let mut message = vec![0; u16::from_be_bytes(length) as usize];
    from.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(to: &mut (impl smol::io::AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    to.write_all(&[&length.to_be_bytes(), message].concat()).await
}

/// resolv.conf(5): without any, the one on the loopback.
fn resolvers(text: &str) -> Vec<SocketAddr> {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next().filter(|word| *word == "nameserver")?;
        let address: IpAddr = words.next()?.parse().ok()?;
        Some(SocketAddr::new(address, PORT))
    });
    let named: Vec<_> = named.take(RESOLVERS_MAX).collect();
    if named.is_empty() { vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT)] } else { named }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(to: &[&str]) -> Names {
        let to = to.iter().map(|text| Reach::parse(text).expect("good")).collect();
        Names::new(to, Count::default(), |_| async { true })
    }

    #[test]
    fn questions_on_their_way_are_bounded_for_each_instance_and_for_all_together() {
        let all = Count::default();
        let instance = || Names::new(Vec::new(), Arc::clone(&all), |_| async { true });
        let instances: Vec<Names> = (0..=QUESTIONS_OF_ALL_MAX / QUESTIONS_MAX).map(|_| instance()).collect();
        let take_all = |names: &Names| -> Vec<[Turn; 2]> { std::iter::from_fn(|| names.turn()).collect() };

        let mut turns: Vec<Vec<[Turn; 2]>> = instances.iter().map(take_all).collect();
        assert!(turns[..turns.len() - 1].iter().all(|turns| turns.len() == QUESTIONS_MAX));
        assert_eq!(turns.last().map(Vec::len), Some(0), "none is left for it");
        turns[0].pop();
        let last = instances.last().expect("one");
        assert!(last.turn().is_some(), "one was answered");
        drop(turns);
        assert_eq!((all.load(Ordering::Relaxed), take_all(last).len()), (0, QUESTIONS_MAX));
    }

    fn way(names: &Names, name: &str, kind: u16) -> &'static str {
        let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            query.push(label.len() as u8);
            query.extend_from_slice(label.as_bytes());
        }
        query.push(0);
        query.extend_from_slice(&[(kind >> 8) as u8, kind as u8, 0, 1]);
        match names.way(&dns::question(&query).expect("a question")) {
            Way::Answer(Code::Refused) => "refused",
            Way::Answer(_) => "nothing",
            Way::PassOn => "passed on",
            Way::Admit => "admitted",
        }
    }

    #[test]
    fn narrowed_functions_get_answers_for_their_names_alone() {
        const TXT: u16 = 16;
        let open = names(&[]);
        let narrow = names(&["redis.site:6379", "*.cloud", "10.0.0.5"]);

        assert_eq!(way(&open, "any.where", A), "passed on");
        assert_eq!(way(&open, "any.where", TXT), "passed on");
        assert_eq!(way(&open, "any.where", AAAA), "nothing");
        assert_eq!(way(&narrow, "redis.site", A), "admitted");
        assert_eq!(way(&narrow, "a.cloud", A), "admitted");
        assert_eq!(way(&narrow, "redis.site", AAAA), "nothing");
        assert_eq!(way(&narrow, "redis.site", TXT), "nothing");
        assert_eq!(way(&narrow, "secret.in.a.name.other", A), "refused");
        assert_eq!(way(&narrow, "secret.in.a.name.other", TXT), "refused");
    }

    #[test]
    fn resolvers_are_read_as_the_c_library_reads_them() {
        let at = |text: &str| resolvers(text).iter().map(ToString::to_string).collect::<Vec<_>>();

        assert_eq!(
            at("# a\nsearch x\nnameserver 10.0.0.1\nnameserver fe80::1 \n"),
            ["10.0.0.1:53", "[fe80::1]:53"]
        );
        assert_eq!(at("nameserver\nnameserver x\n"), ["127.0.0.1:53"]);
        let many = "nameserver 1.1.1.1\n".repeat(9);
        assert_eq!(at(&many).len(), RESOLVERS_MAX);
    }
}
