//! `allow.network = "egress"`: a way out of an instance, through the node, and nothing else.
//!
//! ```text
//! Router      the node's side, while a revision with a way out is prepared
//!   └ Policy      a revision's `allow.to`, as rules
//!       └ Lease       an instance's address and its line (lines.rs)
//! ```
//!
//! Each holds the one above it, so that what nobody needs any more is gone. The launcher owns
//! them: the table of rules belongs to its socket, which the daemon holds too until a killed
//! launcher's instances have ended; lines go with their instances. What can outlive a killed
//! launcher (a route that sets addresses aside, forwarding that was turned on, with its guard, and
//! the table itself) is swept by the daemon before another one is started; a launcher whose daemon
//! was killed sweeps by itself.
//!
//! Both killed at once: the kernel kills every instance with the launcher, the first process of
//! their PID namespace, but first closes what it had open. From Linux 6.9 on the table stays all
//! the same, as nobody's, until neap is started again; before, it goes a moment ahead of the
//! instances.
//!
//! An instance reaches what its policy lets it, by IPv4; never another instance; and only where
//! `allow.to` has their address, what listens on the node or in containers beside it, and
//! link-local hosts. Nobody can begin a connection to an instance. Names are answered by the
//! daemon, inside the instance's own network (names.rs).

mod expressions;
mod forwarding;
mod kernel;
mod lines;
mod others;
mod ruleset;

pub use kernel::Part;
pub use lines::Line;
pub use others::{Hindrance, hindrances};
pub use ruleset::Found;

use self::forwarding::Forwarding;
use self::ruleset::{Batch, FOUND_MAX, LINES, leads_inward};
use super::netlink::Socket;
use crate::model::reach::{Net, Reach};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

/// What one node takes of its range, where it is larger: 1022 instances at once.
const PART_BITS: u8 = 22;

/// RTMGRP_LINK and RTNLGRP_IPV4_NETCONF: interfaces, and whether they forward.
const CHANGES: u32 = 1 | 1 << 23;

/// Digits of an owner and of an address in a line's name, which has 15 bytes: to the base of 36.
const OWNER_DIGITS: usize = 5;
const ADDRESS_DIGITS: usize = 2;

/// A node among others on one machine: from its data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    number: u32,
}

impl Owner {
    /// `mark`: hexadecimal digits that are this node's alone.
    pub fn new(mark: &str) -> Self {
        // Six of them, which are five in an interface's name.
        let digits = mark.get(mark.len().saturating_sub(12)..).and_then(|mark| mark.get(..6));
        let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        Self { number: number.unwrap_or(0) }
    }

    fn table(&self) -> String {
        format!("neap_{:06x}", self.number)
    }

    /// What outlives its launcher (forwarding.rs).
    fn guard(&self) -> String {
        format!("{}_guard", self.table())
    }

    /// What each of its lines' names begins with.
    fn lines(&self) -> String {
        format!("{LINES}{}", in_base_36::<OWNER_DIGITS>(self.number))
    }

    fn line(&self, n: u32) -> String {
        format!("{}{}", self.lines(), in_base_36::<ADDRESS_DIGITS>(n))
    }
}

fn in_base_36<const DIGITS: usize>(number: u32) -> String {
    let place = |n: usize| number / 36_u32.pow((DIGITS - 1 - n) as u32) % 36;
    (0..DIGITS).filter_map(|n| char::from_digit(place(n), 36)).collect()
}

/// Why there is no way out, and what helps.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    #[error("{doing}: {source}")]
    Kernel { doing: &'static str, source: io::Error },
    #[error(
        "no part of [node] egress_range = \"{range}\" is free: {taken} is routed by this machine already; set a range that is not"
    )]
    Taken { range: Net, taken: Net },
    #[error("all {0} addresses of this node's part of [node] egress_range are taken; set a larger one")]
    Full(u32),
}

fn step(doing: &'static str) -> impl Fn(io::Error) -> EgressError {
    move |source| EgressError::Kernel { doing, source }
}

pub struct Router {
    owner: Owner,
    /// Owns the table.
    netfilter: Socket,
    route: Socket,
    changes: Socket,
    /// Tells when rules of anybody's change.
    ruled: Socket,
    part: Net,
    inside: RefCell<Inside>,
}

struct Inside {
    forwarding: Forwarding,
    fenced: Vec<String>,
    policies_made: u64,
    /// The next address that nobody has had yet.
    fresh: u32,
    /// Given back, the longest ago first: the kernel needs a moment to end a network.
    free: VecDeque<u32>,
}

impl Router {
    pub fn open(owner: Owner, range: Net) -> Result<Rc<Self>, EgressError> {
        let route = Socket::route(0).map_err(step("open rtnetlink"))?;
        let netfilter = Socket::netfilter().map_err(step("open nf_tables"))?;
        let changes = Socket::route(CHANGES).map_err(step("watch interfaces"))?;
        let ruled = Socket::netfilter_changes().map_err(step("watch nf_tables"))?;
        let part = take_part(&route, &owner, range)?;
        if let Err(err) = begin(&netfilter, &owner, part) {
            let _ = lines::give_back(&route, part, owner.number);
            return Err(step("make rules for nf_tables")(err));
        }
        let router = Rc::new(Self {
            inside: RefCell::new(Inside {
                forwarding: Forwarding::new(owner.clone()),
                fenced: Vec::new(),
                policies_made: 0,
                fresh: 0,
                free: VecDeque::new(),
            }),
            owner,
            netfilter,
            route,
            changes,
            ruled,
            part,
        });
        // From here on a failure takes apart what there is.
        router.refresh().map_err(step("turn forwarding on"))?;
        Ok(router)
    }

    /// What the rules belong to.
    pub fn rules(&self) -> BorrowedFd<'_> {
        self.netfilter.as_fd()
    }

    /// Readable when interfaces or anybody's rules changed: `follow` is due.
    pub fn changes(&self) -> [BorrowedFd<'_>; 2] {
        [self.changes.as_fd(), self.ruled.as_fd()]
    }

    /// Of rules only the guard's end matters. Its own table nobody else can flush.
    pub fn follow(&self) -> io::Result<()> {
        let guard = self.owner.guard();
        let mut unguarded = false;
        let told = self.ruled.told(|kind, body| unguarded |= ruleset::says_deleted(kind, body, &guard));
        // Too much at once to be told of (ENOBUFS) may have been that.
        if unguarded || told.is_err() || self.changes.told(|_, _| {}).unwrap_or(true) {
            return self.refresh();
        }
        Ok(())
    }

    /// Brings forwarding and the fence in line with the interfaces that there are.
    pub fn refresh(&self) -> io::Result<()> {
        let _ = self.changes.told(|_, _| {}); // what it tells of is seen below
        let links = lines::links(&self.route)?;
        let Inside { forwarding, fenced, .. } = &mut *self.inside.borrow_mut();
        let wanted = lines::fenced(&links);
        if *fenced != wanted {
            let mut batch = Batch::new(&self.owner.table());
            let differ = |a: &[String], b: &[String]| -> Vec<String> {
                a.iter().filter(|name| !b.contains(name)).cloned().collect()
            };
            differ(&wanted, fenced).iter().for_each(|name| batch.interface("fenced", name, true));
            differ(fenced, &wanted).iter().for_each(|name| batch.interface("fenced", name, false));
            self.netfilter.ask_together(batch.finish())?;
            *fenced = wanted;
        }
        forwarding.refresh(&self.netfilter, &self.route, &links)
    }

    /// The daemon was killed and the launcher ends with all of its instances, which were killed.
    pub fn abandon(&self) {
        let _ = self.change(Batch::delete_table); // else whoever starts neap again does it
    }

    fn change(&self, fill: impl FnOnce(&mut Batch)) -> io::Result<()> {
        let mut batch = Batch::new(&self.owner.table());
        fill(&mut batch);
        self.netfilter.ask_together(batch.finish())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        // The daemon has the socket too, and processes that have it from us and are not yet others.
        let told = [
            self.change(Batch::delete_table),
            lines::give_back(&self.route, self.part, self.owner.number),
            self.inside.borrow().forwarding.close(&self.netfilter, &self.route),
        ];
        for err in told.into_iter().filter_map(Result::err) {
            eprintln!("neap launcher: take a way out apart: {err}");
        }
    }
}

/// Sets a part of the range aside that nothing else uses.
fn take_part(route: &Socket, owner: &Owner, range: Net) -> Result<Net, EgressError> {
    let mut contested = Vec::new();
    loop {
        let part = free_part(route, owner, range, &contested)?;
        match lines::reserve(route, part, owner.number) {
            Err(err) if err.kind() != io::ErrorKind::AlreadyExists => {
                return Err(step("set addresses aside by a route")(err));
            }
            _ => {}
        }
        // Another node may have found it free at the same moment: one of both sees the other.
        let alone = lines::routes(route).map(|routes| {
            routes.iter().all(|other| {
                other.owner.is_none_or(|other| other == owner.number) || !other.net.overlaps(part)
            })
        });
        if alone.as_ref().is_ok_and(|alone| *alone) {
            return Ok(part);
        }
        let _ = lines::give_back(route, part, owner.number);
        alone.map_err(step("list routes"))?;
        contested.push(part);
    }
}

/// A part of the range that no route of the machine's overlaps, nor one of `contested`.
fn free_part(route: &Socket, owner: &Owner, range: Net, contested: &[Net]) -> Result<Net, EgressError> {
    let routes = lines::routes(route).map_err(step("list routes"))?;
    let links = lines::links(route).map_err(step("list interfaces"))?;
    let prefix = owner.lines();
    let ours = |route: &lines::Route| {
        let device = links.iter().find(|link| link.index == route.device);
        route.owner == Some(owner.number) || device.is_some_and(|link| link.name.starts_with(&prefix))
    };
    let taken = routes.iter().filter(|route| !ours(route)).map(|route| route.net);
    let taken: Vec<Net> = taken.chain(contested.iter().copied()).collect();
    let parts: Vec<Net> = range.parts(PART_BITS).collect();
    // Each node begins elsewhere, so that two that start at once seldom want the same.
    let first = owner.number as usize % parts.len().max(1);
    let mut found = parts[first..].iter().chain(&parts[..first]);
    let free = found.find(|part| !taken.iter().any(|other| other.overlaps(**part)));
    free.copied().ok_or_else(|| EgressError::Taken {
        range,
        taken: taken.iter().copied().find(|other| other.overlaps(range)).unwrap_or(range),
    })
}

fn begin(netfilter: &Socket, owner: &Owner, part: Net) -> io::Result<()> {
    // One that outlived its holders.
    let _ = delete_left(netfilter, owner);
    let mut done = Err(io::ErrorKind::Unsupported.into());
    for offered in kernel::offers(netfilter) {
        let mut batch = Batch::new(&owner.table());
        batch.begin(&owner.lines(), part, addresses(part), offered);
        done = netfilter.ask_together(batch.finish());
        if done.is_ok() {
            break;
        }
    }
    done
}

fn delete_left(netfilter: &Socket, owner: &Owner) -> io::Result<()> {
    let mut batch = Batch::new(&owner.table());
    batch.delete_table();
    match netfilter.ask_together(batch.finish()) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// How many instances fit: all but the network's own address, the gateway and the broadcast.
fn addresses(part: Net) -> u32 {
    (1_u32 << (32 - u32::from(part.bits))) - 3
}

/// A revision's way out.
pub struct Policy {
    router: Rc<Router>,
    number: u64,
    to: Vec<Reach>,
    /// What its names led to, the oldest first.
    found: RefCell<VecDeque<Found>>,
}

impl Policy {
    pub fn new(router: Rc<Router>, to: &[Reach]) -> Result<Self, EgressError> {
        let number = {
            let mut inside = router.inside.borrow_mut();
            inside.policies_made += 1;
            inside.policies_made
        };
        router.change(|batch| batch.policy(number, to)).map_err(step("make a function's rules"))?;
        Ok(Self { router, number, to: to.to_vec(), found: RefCell::default() })
    }

    /// An address of its own for an instance that is about to be made.
    pub fn lease(self: &Rc<Self>) -> Result<Lease, EgressError> {
        let all = addresses(self.router.part);
        let n = {
            let mut inside = self.router.inside.borrow_mut();
            if inside.fresh < all {
                inside.fresh += 1;
                inside.fresh - 1
            } else {
                inside.free.pop_front().ok_or(EgressError::Full(all))?
            }
        };
        // Dropped when the next step fails, and the address is free again.
        let mut lease = Lease { policy: Rc::clone(self), n, assigned: false };
        let (Line { name, address, .. }, inward) = (lease.line(), leads_inward(&self.to));
        let assigned = self.router.change(|batch| batch.assign(&name, address, self.number, inward));
        assigned.map_err(step("give an instance its rules"))?;
        lease.assigned = true;
        Ok(lease)
    }

    /// Where names of its led to: it may go there.
    pub fn admit(&self, found: &[Found]) -> io::Result<()> {
        let mut known = self.found.borrow_mut();
        let mut new: Vec<Found> = Vec::new();
        for one in found {
            if !known.contains(one) && !new.contains(one) {
                new.push(*one);
            }
        }
        new.truncate(FOUND_MAX as usize);
        if new.is_empty() {
            return Ok(());
        }
        let too_many = (known.len() + new.len()).saturating_sub(FOUND_MAX as usize);
        self.router.change(|batch| {
            known.iter().take(too_many).for_each(|old| batch.found(self.number, *old, false));
        })?;
        known.drain(..too_many);
        self.router.change(|batch| new.iter().for_each(|one| batch.found(self.number, *one, true)))?;
        known.extend(new);
        Ok(())
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if let Err(err) = self.router.change(|batch| batch.delete_policy(self.number, &self.to)) {
            eprintln!("neap launcher: remove a function's rules: {err}");
        }
    }
}

/// An instance's address, for as long as it is there.
pub struct Lease {
    policy: Rc<Policy>,
    n: u32,
    assigned: bool,
}

impl Lease {
    pub fn line(&self) -> Line {
        let Router { owner, part, .. } = &*self.policy.router;
        Line { name: owner.line(self.n), address: part.nth(self.n + 2), gateway: part.nth(1) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let router = &self.policy.router;
        let (Line { name, address, .. }, inward) = (self.line(), leads_inward(&self.policy.to));
        if self.assigned
            && let Err(err) = router.change(|batch| batch.withdraw(&name, address, inward))
        {
            eprintln!("neap launcher: take an instance's rules back: {err}");
        }
        router.inside.borrow_mut().free.push_back(self.n);
    }
}

/// Removes what a killed launcher left. Where it left no route, there was no way out, and a kernel
/// that has no nf_tables isn't asked for it.
pub fn sweep(owner: &Owner) {
    for err in swept(owner).unwrap_or_else(|err| vec![err]) {
        tracing::warn!(error = %err, "sweep what a way out left");
    }
}

fn swept(owner: &Owner) -> io::Result<Vec<io::Error>> {
    let route = Socket::route(0)?;
    let own = owner.lines();
    let is_line = |link: &&lines::Link| link.name.starts_with(&own) && link.kind == "veth";
    for link in lines::links(&route)?.iter().filter(is_line) {
        let _ = lines::delete(&route, &link.name); // its network may be ending by itself
    }
    let mut left = lines::routes(&route)?;
    left.retain(|route| route.owner == Some(owner.number));
    if left.is_empty() {
        return Ok(Vec::new());
    }
    let parts = left.iter().filter(|route| route.noted().is_none());
    let mut done: Vec<io::Result<()>> =
        parts.map(|part| lines::give_back(&route, part.net, owner.number)).collect();
    done.push(Socket::netfilter().and_then(|netfilter| {
        let deleted = delete_left(&netfilter, owner);
        forwarding::close_left(owner, &netfilter, &route).and(deleted)
    }));
    Ok(done.into_iter().filter_map(Result::err).collect())
}

/// What this kernel lacks, and whether it can: by doing it, in a network namespace of the calling
/// thread's own.
pub fn probe() -> Result<Vec<&'static Part>, EgressError> {
    let netfilter =
        Socket::netfilter().map_err(step("open nf_tables: build a kernel with CONFIG_NF_TABLES"))?;
    let lacking = kernel::lacking(&netfilter);
    if lacking.iter().all(|part| part.without.is_some()) {
        let router =
            Router::open(Owner { number: 0 }, Net { address: Ipv4Addr::new(10, 0, 0, 0), bits: 24 })?;
        let _policy = Policy::new(Rc::clone(&router), &[])?;
        lines::try_pair(&router.route).map_err(step("make a veth pair (CONFIG_VETH)"))?;
    }
    Ok(lacking)
}

/// Whether a part of the range is free on this machine.
pub fn find_room(range: Net) -> Result<Net, EgressError> {
    let route = Socket::route(0).map_err(step("open rtnetlink"))?;
    free_part(&route, &Owner { number: u32::MAX }, range, &[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::reach::{Port, Protocol};

    fn net(text: &str) -> Net {
        Net::parse(text).expect("a good network")
    }

    /// In a network namespace of its own; nothing where tests may not have one.
    pub fn alone(test: impl FnOnce() + Send) {
        let enter = || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
        std::thread::scope(|scope| {
            scope.spawn(|| match enter() {
                Ok(()) => test(),
                Err(err) => eprintln!("skipped: no network namespace: {err}"),
            });
        });
    }

    #[test]
    fn a_nodes_names_fit_an_interface_and_differ_from_others() {
        let owner = Owner::new("neap/0123456789ab");

        assert_eq!((owner.table().as_str(), owner.lines().as_str()), ("neap_012345", "vethneap01lj9"));
        let last = addresses(net("10.0.0.0/22")) - 1;
        assert_eq!(
            (owner.line(7).as_str(), owner.line(last).as_str()),
            ("vethneap01lj907", "vethneap01lj9sc")
        );
        assert_eq!(Owner { number: 0xff_ffff }.lines(), "vethneap9zldr");
        assert_ne!(owner, Owner::new("neap/1123456789ab"));
        assert_eq!(Owner::new(""), Owner { number: 0 });
    }

    #[test]
    fn the_kernel_takes_every_kind_of_rule_and_everything_goes_with_its_holder() {
        alone(|| {
            let owner = Owner { number: 7 };
            let route = Socket::route(0).expect("a socket");
            let to = ["10.0.0.5:6379", "10.0.0.6", "192.168.1.0/24:502/udp", "redis.site:6379", "*.cloud"];
            let to: Vec<Reach> = to.iter().map(|text| Reach::parse(text).expect("good")).collect();
            let router = Router::open(owner.clone(), net("10.213.0.0/16")).expect("opened");

            let open = Rc::new(Policy::new(Rc::clone(&router), &[]).expect("a policy"));
            let narrow = Rc::new(Policy::new(Rc::clone(&router), &to).expect("a policy"));
            let (one, two) = (open.lease().expect("an address"), narrow.lease().expect("an address"));
            let port = Some(Port { protocol: Protocol::Tcp, number: 6379 });
            let many: Vec<Found> =
                (0..FOUND_MAX + 9).map(|n| (Ipv4Addr::from(0x0a00_0000 + n), port)).collect();
            for found in [&many[..1], &many[..1], &[(Ipv4Addr::new(1, 2, 3, 4), None)], &many[1..]] {
                narrow.admit(found).expect("admitted");
            }

            assert_ne!(one.line().address, two.line().address);
            assert_eq!(lines::routes(&route).expect("listed").len(), 1);
            drop((one, two, open, narrow, router));
            assert_eq!(lines::routes(&route).expect("listed"), []);
            sweep(&owner);
            probe().expect("possible");
        });
    }

    #[test]
    fn addresses_are_bounded_given_back_and_the_longest_unused_comes_first() {
        alone(|| {
            let router = Router::open(Owner { number: 8 }, net("10.1.2.0/29")).expect("opened");
            let policy = Rc::new(Policy::new(router, &[]).expect("a policy"));
            let mut leases: Vec<Lease> = (0..5).map(|_| policy.lease().expect("room")).collect();
            let addresses: Vec<_> = leases.iter().map(|lease| lease.line().address.octets()[3]).collect();
            assert_eq!(addresses, [2, 3, 4, 5, 6]);

            let full = policy.lease().map(|_| ()).expect_err("full").to_string();
            assert!(full.contains("all 5 addresses") && full.contains("egress_range"), "{full}");
            drop((leases.remove(3), leases.remove(1)));
            assert_eq!(policy.lease().expect("room").line().address.octets()[3], 5);
        });
    }

    #[test]
    fn nodes_that_start_at_the_same_moment_take_different_parts() {
        let together = std::sync::Barrier::new(2);
        let take = |number| {
            let route = Socket::route(0).expect("a socket");
            together.wait();
            take_part(&route, &Owner { number }, net("10.213.0.0/16")).expect("enough for two")
        };
        alone(|| {
            for _ in 0..50 {
                let (one, two) = std::thread::scope(|scope| {
                    // Both begin with the same part.
                    let (one, two) = (scope.spawn(|| take(64)), scope.spawn(|| take(128)));
                    (one.join().expect("taken"), two.join().expect("taken"))
                });
                assert!(!one.overlaps(two), "{one} {two}");
                let route = Socket::route(0).expect("a socket");
                lines::give_back(&route, one, 64).expect("given back");
                lines::give_back(&route, two, 128).expect("given back");
            }
        });
    }

    #[test]
    fn two_nodes_take_different_parts_and_what_is_routed_elsewhere_is_not_taken() {
        alone(|| {
            let one = Router::open(Owner { number: 64 }, net("10.213.0.0/16")).expect("opened");
            let two = Router::open(Owner { number: 128 }, net("10.213.0.0/16")).expect("opened");
            assert!(!one.part.overlaps(two.part), "{} {}", one.part, two.part);

            let small = one.part;
            let taken = Router::open(Owner { number: 9 }, small).map(|_| ()).expect_err("taken").to_string();
            assert!(
                taken.contains(&format!("{small} is routed")) && taken.contains("set a range"),
                "{taken}"
            );
            drop(one);
            Router::open(Owner { number: 9 }, small).expect("free again");
        });
    }
}
