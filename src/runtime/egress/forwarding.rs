//! Whether the node passes packets on between its interfaces, which a way out needs in both
//! directions, and which makes a router of it.
//!
//! Where `net.ipv4.ip_forward` is on, somebody else has decided that, and nothing is done. Where
//! it is off, forwarding is turned on for the interfaces that are there, one by one, and a guard
//! among the rules lets what comes in by them go to instances alone, so that the node still is no
//! router. When somebody turns it on for all after that, docker for one, the guard goes: what the
//! others need is theirs. What was turned on is turned off at the end, unless it is on for all by
//! then.
//!
//! The guard is there twice. The launcher's own table has it, which nobody else can flush; and a
//! table of nobody's, for when the launcher was killed, is made again when somebody flushed it.
//! What to turn off then is noted among the routes (`lines::note`).

use super::Owner;
use super::lines::{self, Link, Route};
use super::ruleset::{self, Batch, LINES, OPENED_MAX};
use crate::runtime::netlink::Socket;
use std::fs;
use std::io;

pub struct Forwarding {
    owner: Owner,
    opened: Vec<Link>,
}

impl Forwarding {
    pub fn new(owner: Owner) -> Self {
        Self { owner, opened: Vec::new() }
    }

    /// Brings what is turned on, and guarded, in line with the interfaces that there are.
    pub fn refresh(&mut self, netfilter: &Socket, route: &Socket, links: &[Link]) -> io::Result<()> {
        // `net.ipv4.ip_forward = 0` turned them off too.
        let own = self.owner.lines();
        for line in links.iter().filter(|link| link.name.starts_with(&own) && !is_on(&link.name)) {
            turn_on(&line.name)?;
        }
        let wanted = self.wanted(links);
        if wanted.len() > OPENED_MAX as usize {
            return Err(io::Error::other(format!(
                "there are {} interfaces to do it for one by one, {OPENED_MAX} at most; set net.ipv4.ip_forward = 1, \
                 and neap leaves it alone",
                wanted.len()
            )));
        }
        let gone: Vec<&Link> = without(&self.opened, &wanted);
        let new: Vec<&Link> = without(&wanted, &self.opened);
        let differs = !gone.is_empty() || !new.is_empty();
        for link in &new {
            lines::note(route, link.index, self.owner.number)?;
        }
        if differs || !(self.opened.is_empty() || is_guarded(&self.owner, netfilter)?) {
            guard(&self.owner, netfilter, &wanted)?;
        }
        if differs {
            let mut batch = Batch::new(&self.owner.table());
            gone.iter().for_each(|link| batch.opened(&link.name, link.is_bridge(), false));
            new.iter().for_each(|link| batch.opened(&link.name, link.is_bridge(), true));
            netfilter.ask_together(batch.finish())?;
            // A new name for the same interface leaves its note.
            for link in gone.iter().filter(|gone| !wanted.iter().any(|link| link.index == gone.index)) {
                let _ = lines::strike(route, link.index, self.owner.number); // a note too many does no harm
            }
            self.opened = wanted;
        }
        self.opened.iter().filter(|link| !is_on(&link.name)).try_for_each(|link| turn_on(&link.name))
    }

    /// Interfaces to turn on, or that were and still are there.
    fn wanted(&self, links: &[Link]) -> Vec<Link> {
        if is_on("all") {
            return Vec::new();
        }
        let fenced = lines::fenced(links);
        let bridges: Vec<u32> = links.iter().filter(|link| link.is_bridge()).map(|link| link.index).collect();
        let wanted = links.iter().filter(|link| {
            let is_port = link.master.is_some_and(|master| bridges.contains(&master));
            let is_ours = || self.opened.iter().any(|opened| opened.index == link.index);
            let is_other =
                link.name == "lo" || link.name.starts_with(LINES) || fenced.contains(&link.name) || is_port;
            !is_other && (is_ours() || !is_on(&link.name))
        });
        wanted.cloned().collect()
    }

    /// Turns off what it turned on.
    pub fn close(&self, netfilter: &Socket, route: &Socket) -> io::Result<()> {
        close(&self.owner, netfilter, route, &self.opened)
    }
}

/// Turns off what a `Forwarding` turned on that was killed.
pub fn close_left(owner: &Owner, netfilter: &Socket, route: &Socket) -> io::Result<()> {
    close(owner, netfilter, route, &[])
}

/// `opened`: beside what is noted, should somebody have removed that.
fn close(owner: &Owner, netfilter: &Socket, route: &Socket, opened: &[Link]) -> io::Result<()> {
    let routes = lines::routes(route)?;
    let ours = routes.iter().filter(|route| route.owner == Some(owner.number));
    let noted: Vec<u32> = ours.filter_map(Route::noted).collect();
    if !is_on("all") {
        for link in lines::links(route)? {
            if noted.contains(&link.index) || opened.iter().any(|opened| opened.index == link.index) {
                let _ = turn(&link.name, "0"); // it may have gone
            }
        }
    }
    let unguarded = guard(owner, netfilter, &[]);
    for index in noted {
        lines::strike(route, index, owner.number)?;
    }
    unguarded
}

/// The guard as it has to be, all of it at once: none for no interfaces.
fn guard(owner: &Owner, netfilter: &Socket, opened: &[Link]) -> io::Result<()> {
    let mut batch = Batch::new(&owner.guard());
    batch.delete_left_table();
    if !opened.is_empty() {
        batch.guard();
    }
    opened.iter().for_each(|link| batch.opened(&link.name, link.is_bridge(), true));
    netfilter.ask_together(batch.finish())
}

fn is_guarded(owner: &Owner, netfilter: &Socket) -> io::Result<bool> {
    match netfilter.ask(ruleset::table(&owner.guard())) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        asked => asked.map(|()| true),
    }
}

/// Those of `some` that aren't among `others`, by number and name.
fn without<'a>(some: &'a [Link], others: &[Link]) -> Vec<&'a Link> {
    let same = |a: &Link, b: &Link| (a.index, &a.name, a.is_bridge()) == (b.index, &b.name, b.is_bridge());
    some.iter().filter(|link| !others.iter().any(|other| same(link, other))).collect()
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{name}/forwarding")
}

fn is_on(name: &str) -> bool {
    fs::read_to_string(path(name)).is_ok_and(|text| text.trim() == "1")
}

fn turn_on(name: &str) -> io::Result<()> {
    match turn(name, "1") {
        // It has gone meanwhile.
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn turn(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value)
}
