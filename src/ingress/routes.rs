//! What is deployed, and which function an arrival is for. A snapshot: a deploy publishes a
//! new one, readers keep theirs until they look again. Pure.

use crate::config::Forward;
use crate::model::function::{HttpTrigger, MqttTrigger, Trigger};
use crate::model::{FunctionName, Lane, Revision, Target, TopicFilter, TopicTemplate};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// What `[[forward]]` passes on; larger messages are acknowledged, dropped and counted. It is
/// the default of limits.payload, which a forward has no place to set.
pub const FORWARD_BYTES_MAX: u64 = 1 << 20;

/// Functions by name, and what the node's configuration says of where things go.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    pub functions: BTreeMap<FunctionName, Deployment>,
    pub forwards: Vec<Forward>,
    /// `[node] id`
    pub node: String,
    /// `[uplink] topic`: for outputs without a topic of their own. `None` without an uplink.
    pub uplink_topic: Option<TopicTemplate>,
}

#[derive(Clone, Debug)]
pub struct Deployment {
    pub revision: Arc<Revision>,
    pub paused: bool,
    /// The file in functions_dir that owns it.
    pub file: Option<PathBuf>,
    pub created: crate::model::UnixMs,
    /// Why it can't run here (its image is gone, its root can't be made); its events wait.
    pub unusable: Option<String>,
}

impl Deployment {
    /// Its events may run now; else they wait.
    pub fn runnable(&self) -> bool {
        !self.paused && self.unusable.is_none()
    }
}

/// What a broker should be subscribed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    pub filter: TopicFilter,
    pub qos: u8,
}

pub enum HttpMatch<'a> {
    Function(&'a Deployment, &'a HttpTrigger),
    /// The path is known, the method isn't: the methods that are.
    Method(Vec<&'a str>),
    None,
}

impl Routes {
    pub fn function(&self, name: &str) -> Option<&Deployment> {
        let name = FunctionName::parse(name).ok()?;
        self.functions.get(&name)
    }

    /// The function with an http trigger for this path. `check` and deploy refuse two functions
    /// on one path and method.
    pub fn http(&self, method: &str, path: &str) -> HttpMatch<'_> {
        let mut methods = Vec::new();
        for deployment in self.functions.values() {
            for trigger in &deployment.revision.manifest.triggers {
                let Trigger::Http(http) = trigger else { continue };
                if http.path != path {
                    continue;
                }
                if http.methods.is_empty() || http.methods.iter().any(|m| m == method) {
                    return HttpMatch::Function(deployment, http);
                }
                methods.extend(http.methods.iter().map(String::as_str));
            }
        }
        if methods.is_empty() { HttpMatch::None } else { HttpMatch::Method(methods) }
    }

    /// Functions that a message on `topic` triggers, each once, by its first trigger that
    /// matches. Paused functions are meant too: their events wait.
    pub fn mqtt<'a>(
        &'a self,
        from: Target,
        topic: &'a str,
    ) -> impl Iterator<Item = (&'a FunctionName, &'a MqttTrigger)> {
        self.functions.iter().filter_map(move |(name, deployment)| {
            let triggers = deployment.revision.manifest.triggers.iter();
            let mut mqtt = triggers.filter_map(|t| if let Trigger::Mqtt(m) = t { Some(m) } else { None });
            mqtt.find(|m| m.from == from && m.filter.matches(topic)).map(|m| (name, m))
        })
    }

    pub fn forwards<'a>(&'a self, topic: &'a str) -> impl Iterator<Item = &'a Forward> {
        self.forwards.iter().filter(move |f| f.filter.matches(topic))
    }

    /// Functions triggered by events of this CloudEvents type.
    pub fn event<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a FunctionName> {
        self.functions.iter().filter_map(move |(name, deployment)| {
            let mut triggers = deployment.revision.manifest.triggers.iter();
            triggers.any(|t| matches!(t, Trigger::Event { kind: k } if k == kind)).then_some(name)
        })
    }

    /// The lane of a function's events.
    pub fn lane(&self, name: &FunctionName) -> Lane {
        self.functions.get(name).map_or(Lane::default(), |deployment| deployment.revision.manifest.priority)
    }

    /// The largest message from this broker that anybody here wants.
    pub fn payload_bytes_max(&self, from: Target) -> u64 {
        let wants = |d: &&Deployment| {
            let mut triggers = d.revision.manifest.triggers.iter();
            triggers.any(|t| matches!(t, Trigger::Mqtt(mqtt) if mqtt.from == from))
        };
        let functions = self.functions.values().filter(wants);
        let functions = functions.map(|d| d.revision.manifest.limits.payload_bytes).max().unwrap_or(0);
        let forwards = from == Target::Local && !self.forwards.is_empty();
        if forwards { functions.max(FORWARD_BYTES_MAX) } else { functions }
    }

    /// Each filter once, with the highest QoS that anybody asked for; sorted.
    pub fn subscriptions(&self, from: Target) -> Vec<Subscription> {
        let mut filters: BTreeMap<&TopicFilter, u8> = BTreeMap::new();
        for deployment in self.functions.values() {
            for trigger in &deployment.revision.manifest.triggers {
                let Trigger::Mqtt(mqtt) = trigger else { continue };
                if mqtt.from == from {
                    let qos = filters.entry(&mqtt.filter).or_default();
                    *qos = (*qos).max(mqtt.qos);
                }
            }
        }
        if from == Target::Local {
            for forward in &self.forwards {
                filters.insert(&forward.filter, 1);
            }
        }
        filters.into_iter().map(|(filter, qos)| Subscription { filter: filter.clone(), qos }).collect()
    }
}
