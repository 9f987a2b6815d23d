//! The extensions of one Lambda instance: who registered, for which events, and what each is told
//! next. Pure.
//!
//! An extension asks for its next event and is told of each invocation once, and of the
//! instance's end. External ones (`/opt/extensions`) are started by whoever is the container's
//! first process; neap starts none.

use super::runtime_api::Invocation;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// AWS registers ten at most.
const EXTENSIONS_MAX: usize = 10;

#[derive(Debug, Default)]
pub struct Extensions(BTreeMap<String, Extension>);

#[derive(Debug)]
struct Extension {
    name: String,
    invokes: bool,
    shuts_down: bool,
    waits: bool,
    /// The invocation that it was last told of.
    told: Option<String>,
}

/// What came of a registration.
#[derive(Debug, PartialEq, Eq)]
pub enum Registered {
    As(String),
    TooMany,
    BadEvents(&'static str),
}

impl Extensions {
    /// `body`: `{"events": ["INVOKE", "SHUTDOWN"]}`, either or neither.
    pub fn register(&mut self, name: String, body: &[u8], id: String) -> Registered {
        if self.0.len() >= EXTENSIONS_MAX {
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
        self.0.insert(id.clone(), Extension { name, invokes, shuts_down, waits: false, told: None });
        Registered::As(id)
    }

    /// Its name, if it was one.
    pub fn remove(&mut self, id: &str) -> Option<String> {
        self.0.remove(id).map(|extension| extension.name)
    }

    /// It asks for its next event. False: there is no such one.
    pub fn waits(&mut self, id: &str) -> bool {
        let extension = self.0.get_mut(id);
        extension.map(|extension| extension.waits = true).is_some()
    }

    pub fn all_wait(&self) -> bool {
        self.0.values().all(|extension| extension.waits)
    }

    pub fn any_shuts_down(&self) -> bool {
        self.0.values().any(|extension| extension.shuts_down)
    }

    /// What it is told of the invocation that runs; `None`: nothing, or nothing more.
    pub fn invoke(&mut self, id: &str, invocation: &Invocation) -> Option<Value> {
        let extension = self.0.get_mut(id).filter(|extension| extension.invokes)?;
        if extension.told.as_ref() == Some(&invocation.id) {
            return None;
        }
        extension.told = Some(invocation.id.clone());
        extension.waits = false;
        Some(json!({
            "eventType": "INVOKE",
            "deadlineMs": invocation.deadline_ms,
            "requestId": invocation.id,
            "invokedFunctionArn": invocation.arn,
            "tracing": { "type": "X-Amzn-Trace-Id", "value": invocation.trace },
        }))
    }

    /// The same of the instance's end.
    pub fn shut_down(&mut self, id: &str, deadline_ms: i64) -> Option<Value> {
        let extension = self.0.get_mut(id).filter(|extension| extension.shuts_down && extension.waits)?;
        extension.waits = false;
        Some(json!({ "eventType": "SHUTDOWN", "shutdownReason": "spindown", "deadlineMs": deadline_ms }))
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

    #[test]
    fn each_is_told_of_what_it_registered_for_and_once() {
        let invocation = Invocation {
            id: "7".to_owned(),
            payload: Vec::new(),
            headers: Vec::new(),
            deadline_ms: 5,
            arn: "arn".to_owned(),
            trace: "Root=1".to_owned(),
        };
        let mut both = extensions(r#"{"events":["INVOKE","SHUTDOWN"]}"#);
        let mut neither = extensions("{}");

        assert!(!both.all_wait() && both.waits("1") && both.all_wait());
        let told = both.invoke("1", &invocation).expect("it is told");
        assert_eq!((&told["requestId"], &told["deadlineMs"]), (&json!("7"), &json!(5)));
        assert_eq!(both.invoke("1", &invocation), None);
        assert_eq!(both.shut_down("1", 9), None, "it does not ask");
        both.waits("1");
        assert_eq!(both.shut_down("1", 9).expect("it is told")["eventType"], "SHUTDOWN");
        assert!(both.any_shuts_down() && !neither.any_shuts_down());
        assert!(neither.waits("1") && !neither.waits("2"));
        assert_eq!((neither.invoke("1", &invocation), neither.shut_down("1", 9)), (None, None));
    }

    #[test]
    fn eleventh_and_unknown_events_are_refused() {
        let mut extensions = Extensions::default();
        for n in 0..EXTENSIONS_MAX {
            assert!(matches!(extensions.register(String::new(), b"{}", n.to_string()), Registered::As(_)));
        }
        assert_eq!(extensions.register(String::new(), b"{}", "x".to_owned()), Registered::TooMany);
        assert_eq!(extensions.remove("3"), Some(String::new()));
        let bad = extensions.register(String::new(), br#"{"events":["SLEEP"]}"#, "x".to_owned());
        assert!(matches!(bad, Registered::BadEvents(_)));
    }
}
