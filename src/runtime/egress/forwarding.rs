//! Whether the node passes packets on between its interfaces, which a way out needs in both
//! directions, and which makes a router of it.
//!
//! Where `net.ipv4.ip_forward` is on, somebody else has decided that, and nothing is done. Where
//! it is off, forwarding is turned on for the interfaces that are there, one by one, and a guard
//! among the rules lets what comes in by them go to instances alone, so that the node still is no
//! router. When somebody turns it on for all after that, docker for one, the guard goes: what the
//! others need is theirs. What was turned on is turned off at the end, unless it is on for all by
//! then. The guard's set is also the record of what to turn off, should neap be killed.

use super::lines::{self, Link};
use super::ruleset::{Batch, LINES, OPENED_MAX, elements, keys};
use crate::runtime::netlink::{Socket, text};
use std::fs;
use std::io;

pub struct Forwarding {
    guard: String,
    opened: Vec<String>,
}

impl Forwarding {
    pub fn new(table: &str) -> Self {
        Self { guard: guard(table), opened: Vec::new() }
    }

    /// Brings what is turned on, and guarded, in line with the interfaces that there are.
    pub fn refresh(&mut self, netfilter: &Socket, links: &[Link]) -> io::Result<()> {
        if is_on("all") {
            if !self.opened.is_empty() {
                let mut batch = Batch::new(&self.guard);
                batch.delete_left_table();
                netfilter.ask_together(batch.finish())?;
                self.opened.clear();
            }
            return Ok(());
        }
        let fenced = lines::fenced(links);
        for Link { name, .. } in links {
            if name == "lo" || name.starts_with(LINES) || fenced.contains(name) || is_on(name) {
                continue;
            }
            if !self.opened.contains(name) {
                if self.opened.len() >= OPENED_MAX as usize {
                    return Err(io::Error::other("more interfaces than any node has"));
                }
                let mut batch = Batch::new(&self.guard);
                if self.opened.is_empty() {
                    batch.guard();
                }
                batch.interface("opened", name, true);
                netfilter.ask_together(batch.finish())?;
                self.opened.push(name.clone());
            }
            match turn(name, "1") {
                // It has gone meanwhile.
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }
}

/// Turns off what `Forwarding` turned on, also for one that was killed.
pub fn close(table: &str, netfilter: &Socket) -> io::Result<()> {
    let guard = guard(table);
    let mut opened = Vec::new();
    let listed = netfilter.list(elements(&guard, "opened"), |_, body| opened.extend(keys(body)));
    match listed {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        done => done?,
    }
    if !is_on("all") {
        for name in opened {
            let _ = turn(&text(&name), "0"); // it may have gone
        }
    }
    let mut batch = Batch::new(&guard);
    batch.delete_left_table();
    netfilter.ask_together(batch.finish())
}

fn guard(table: &str) -> String {
    format!("{table}_guard")
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{name}/forwarding")
}

fn is_on(name: &str) -> bool {
    fs::read_to_string(path(name)).is_ok_and(|text| text.trim() == "1")
}

fn turn(name: &str, value: &str) -> io::Result<()> {
    fs::write(path(name), value)
}
