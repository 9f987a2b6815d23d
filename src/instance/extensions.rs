//! The extensions of one Lambda instance: who was started, who registered, for which events, and
//! what each is told next. Pure.
//!
//! An external one, started from `/opt/extensions` (runtime/extensions.rs), registers by its file's
//! name; whoever else registers is one within the runtime. Each asks for its next event and is
//! told of every invocation once, however late it asks, and of the instance's end.

use super::runtime_api::Invocation;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// AWS registers ten at most.
const EXTENSIONS_MAX: usize = 10;

#[derive(Debug, Default)]
pub struct Extensions {
    /// Files' names.
    started: BTreeSet<String>,
    registered: BTreeMap<String, Extension>,
}

#[derive(Debug)]
struct Extension {
    name: String,
    invokes: bool,
    shuts_down: bool,
    /// It asks for its next event.
    waits: bool,
    /// That event, if there is one.
    next: Option<Value>,
}

/// What came of a registration.
#[derive(Debug, PartialEq, Eq)]
pub enum Registered {
    As(String),
    TooMany,
    /// By another, or by itself before.
    NameTaken,
    BadEvents(&'static str),
}

impl Extensions {
    /// These run, and are to register.
    pub fn started(&mut self, names: impl Iterator<Item = String>) {
        self.started.extend(names);
    }

    pub fn is_external(&self, name: &str) -> bool {
        self.started.contains(name)
    }

    /// `body`: `{"events": ["INVOKE", "SHUTDOWN"]}`, either or neither.
    pub fn register(&mut self, name: String, body: &[u8], id: String) -> Registered {
        if self.registered.values().any(|extension| extension.name == name) {
            return Registered::NameTaken;
        }
        // Those that were started have their places.
        let others = self.missing().filter(|missing| **missing != name).count();
        if self.registered.len() + others >= EXTENSIONS_MAX {
            return Registered::TooMany;
        }
        let (mut invokes, mut shuts_down) = (false, false);
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        for event in body["events"].as_array().into_iter().flatten() {
            match event.as_str() {
                Some("INVOKE") => invokes = true,
                Some("SHUTDOWN") => shuts_down = true,
                _ => return Registered::BadEvents("events are INVOKE and SHUTDOWN"),
            }
        }
        let extension = Extension { name, invokes, shuts_down, waits: false, next: None };
        self.registered.insert(id.clone(), extension);
        Registered::As(id)
    }

    /// Its name, if it was one.
    pub fn remove(&mut self, id: &str) -> Option<String> {
        self.registered.remove(id).map(|extension| extension.name)
    }

    /// It asks for its next event. False: there is no such one.
    pub fn waits(&mut self, id: &str) -> bool {
        let extension = self.registered.get_mut(id);
        extension.map(|extension| extension.waits = true).is_some()
    }

    /// That were started and have not registered.
    pub fn missing(&self) -> impl Iterator<Item = &String> {
        let has = |name: &str| self.registered.values().any(|extension| extension.name == name);
        self.started.iter().filter(move |name| !has(name))
    }

    /// That have registered and do something else than to ask for their next event.
    pub fn busy(&self) -> impl Iterator<Item = &String> {
        let busy = self.registered.values().filter(|one| !one.waits || one.next.is_some());
        busy.map(|extension| &extension.name)
    }

    pub fn all_wait(&self) -> bool {
        self.missing().next().is_none() && self.busy().next().is_none()
    }

    /// An invocation begins. What an extension did not ask for until now, it has missed.
    pub fn invoke(&mut self, invocation: &Invocation) {
        let event = json!({
            "eventType": "INVOKE",
            "deadlineMs": invocation.deadline_ms,
            "requestId": invocation.id,
            "invokedFunctionArn": invocation.arn,
            "tracing": { "type": "X-Amzn-Trace-Id", "value": invocation.trace },
        });
        for extension in self.registered.values_mut().filter(|extension| extension.invokes) {
            extension.next = Some(event.clone());
        }
    }

    /// The instance ends. Whether one wants to know.
    pub fn shut_down(&mut self, deadline_ms: i64) -> bool {
        let mut wanted = false;
        for extension in self.registered.values_mut() {
            let event =
                json!({ "eventType": "SHUTDOWN", "shutdownReason": "spindown", "deadlineMs": deadline_ms });
            extension.next = extension.shuts_down.then_some(event);
            wanted |= extension.shuts_down;
        }
        wanted
    }

    /// What one that asks is told; `None`: nothing yet.
    pub fn next(&mut self, id: &str) -> Option<Value> {
        let extension = self.registered.get_mut(id)?;
        let event = extension.next.take()?;
        extension.waits = false;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extensions(body: &str) -> Extensions {
        let mut extensions = Extensions::default();
        let id = extensions.register("spy".to_owned(), body.as_bytes(), "1".to_owned());
        assert_eq!(id, Registered::As("1".to_owned()));
        extensions
    }

    fn invocation(id: &str) -> Invocation {
        Invocation {
            id: id.to_owned(),
            payload: Vec::new(),
            headers: Vec::new(),
            deadline_ms: 5,
            arn: "arn".to_owned(),
            trace: "Root=1".to_owned(),
        }
    }

    #[test]
    fn each_is_told_of_what_it_registered_for_and_once() {
        let mut both = extensions(r#"{"events":["INVOKE","SHUTDOWN"]}"#);
        let mut neither = extensions("{}");

        assert!(!both.all_wait() && both.waits("1") && both.all_wait());
        both.invoke(&invocation("7"));
        assert!(!both.all_wait(), "it has something to do");
        let told = both.next("1").expect("it is told");
        assert_eq!((&told["requestId"], &told["deadlineMs"]), (&json!("7"), &json!(5)));
        assert_eq!(both.next("1"), None);
        assert!(!both.all_wait() && both.waits("1") && both.all_wait());
        assert!(both.shut_down(9));
        assert_eq!(both.next("1").expect("it is told")["eventType"], "SHUTDOWN");
        assert!(neither.waits("1") && !neither.waits("2"));
        neither.invoke(&invocation("7"));
        assert!(!neither.shut_down(9) && neither.next("1").is_none() && neither.all_wait());
    }

    #[test]
    fn invocation_that_was_answered_before_an_extension_asked_is_told_all_the_same() {
        let mut slow = extensions(r#"{"events":["INVOKE"]}"#);

        slow.invoke(&invocation("7"));
        slow.waits("1");

        assert_eq!(slow.next("1").expect("it is told")["requestId"], "7");
    }

    #[test]
    fn those_that_were_started_are_waited_for_by_name_and_have_their_places() {
        let mut extensions = Extensions::default();
        extensions.started(["a", "b"].map(str::to_owned).into_iter());
        assert!(!extensions.all_wait() && extensions.is_external("a") && !extensions.is_external("x"));
        for n in 0..EXTENSIONS_MAX - 2 {
            let registered = extensions.register(format!("in{n}"), b"{}", n.to_string());
            assert!(matches!(registered, Registered::As(_)));
        }

        assert_eq!(extensions.register("late".into(), b"{}", "x".into()), Registered::TooMany);
        assert!(matches!(extensions.register("b".into(), b"{}", "x".into()), Registered::As(_)));
        assert_eq!(extensions.missing().collect::<Vec<_>>(), ["a"]);
        assert_eq!(extensions.register("b".into(), b"{}", "y".into()), Registered::NameTaken);
    }

    #[test]
    fn eleventh_and_unknown_events_are_refused() {
        let mut extensions = Extensions::default();
        for n in 0..EXTENSIONS_MAX {
            let registered = extensions.register(n.to_string(), b"{}", n.to_string());
            assert!(matches!(registered, Registered::As(_)));
        }
        assert_eq!(extensions.register(String::new(), b"{}", "x".to_owned()), Registered::TooMany);
        assert_eq!(extensions.remove("3"), Some("3".to_owned()));
        let bad = extensions.register(String::new(), br#"{"events":["SLEEP"]}"#, "x".to_owned());
        assert!(matches!(bad, Registered::BadEvents(_)));
    }
}
