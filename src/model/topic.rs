//! MQTT topic names, filters and topic templates (MQTT 5.0 section 4.7 and 4.8.2), checked once.

use serde::Serialize;
use std::fmt;

/// A topic is at most this long on the wire: a 16-bit length (MQTT 5.0 §1.5.4).
pub const TOPIC_BYTES_MAX: usize = 65_535;

/// A topic filter such as `sensors/+/temperature` or `$share/group/sensors/#`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct TopicFilter(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadTopic {
    #[error("a topic is 1 to 65535 bytes of UTF-8 without NUL")]
    Length,
    #[error("`#` stands alone in the last level, as in `sensors/#`")]
    Hash,
    #[error("`+` fills a whole level, as in `sensors/+/temperature`")]
    Plus,
    #[error("a shared subscription is `$share/GROUP/FILTER`, GROUP without `+`, `#` and `/`")]
    Share,
    #[error("a topic to publish to has no `+` or `#`")]
    Wildcard,
    #[error("unknown placeholder {{{name}}}; known here: {known}")]
    Placeholder { name: String, known: String },
    #[error("a placeholder's `{{` is never closed")]
    Brace,
}

impl TopicFilter {
    pub fn parse(text: &str) -> Result<Self, BadTopic> {
        check_text(text)?;
        let filter = match text.strip_prefix("$share/") {
            Some(rest) => {
                let (group, filter) = rest.split_once('/').ok_or(BadTopic::Share)?;
                if group.is_empty() || filter.is_empty() || group.contains(['+', '#']) {
                    return Err(BadTopic::Share);
                }
                filter
            }
            None if text == "$share" => return Err(BadTopic::Share),
            None => text,
        };
        let mut levels = filter.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(BadTopic::Hash);
            }
            if level.contains('+') && level != "+" {
                return Err(BadTopic::Plus);
            }
        }
        Ok(Self(text.to_owned()))
    }

    /// As it is sent to the broker.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_shared(&self) -> bool {
        self.0.starts_with("$share/")
    }

    /// Whether a message on `topic` is meant. Wildcards in the first level leave out topics
    /// that begin with `$` (MQTT 5.0 §4.7.2).
    pub fn matches(&self, topic: &str) -> bool {
        let filter = match self.0.strip_prefix("$share/") {
            Some(rest) => rest.split_once('/').map_or(rest, |(_, filter)| filter),
            None => &self.0,
        };
        if topic.starts_with('$') && filter.starts_with(['+', '#']) {
            return false;
        }
        let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
        loop {
            match (filter.next(), topic.next()) {
                (Some("#"), _) | (None, None) => return true,
                (Some("+"), Some(_)) => {}
                (Some(f), Some(t)) if f == t => {}
                _ => return false,
            }
        }
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A topic to publish to, with `{node}`, `{function}`, `{topic}` and `{topic.N}` (level N of
/// the event's own topic, from 0).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct TopicTemplate(String);

/// What a template is filled from.
#[derive(Clone, Copy, Debug)]
pub struct TopicValues<'a> {
    pub node: &'a str,
    /// Empty for `[[forward]]`.
    pub function: &'a str,
    /// The event's subject; empty when it has none.
    pub topic: &'a str,
}

impl TopicTemplate {
    pub fn parse(text: &str) -> Result<Self, BadTopic> {
        check_text(text)?;
        if text.contains(['+', '#']) {
            return Err(BadTopic::Wildcard);
        }
        let mut rest = text;
        while let Some(open) = rest.find('{') {
            let (name, after) = rest[open + 1..].split_once('}').ok_or(BadTopic::Brace)?;
            let level = name.strip_prefix("topic.").is_some_and(|n| n.parse::<u16>().is_ok());
            if !level && !matches!(name, "node" | "function" | "topic") {
                let known = "{node}, {function}, {topic}, {topic.N}".to_owned();
                return Err(BadTopic::Placeholder { name: name.to_owned(), known });
            }
            rest = after;
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The topic; an error when what came out can't be published to (a subject with `+`, a
    /// level that isn't there leaving an empty topic, too long).
    pub fn render(&self, values: TopicValues<'_>) -> Result<String, BadTopic> {
        let mut topic = String::with_capacity(self.0.len() + 16);
        let mut rest = self.0.as_str();
        while let Some(open) = rest.find('{') {
            topic.push_str(&rest[..open]);
            let (name, after) = rest[open + 1..].split_once('}').ok_or(BadTopic::Brace)?;
            topic.push_str(match name {
                "node" => values.node,
                "function" => values.function,
                "topic" => values.topic,
                other => {
                    let level = other.strip_prefix("topic.").and_then(|n| n.parse().ok());
                    level.and_then(|n: usize| values.topic.split('/').nth(n)).unwrap_or("")
                }
            });
            rest = after;
        }
        topic.push_str(rest);
        check_text(&topic)?;
        if topic.contains(['+', '#']) { Err(BadTopic::Wildcard) } else { Ok(topic) }
    }
}

fn check_text(text: &str) -> Result<(), BadTopic> {
    let good = (1..=TOPIC_BYTES_MAX).contains(&text.len()) && !text.contains('\0');
    if good { Ok(()) } else { Err(BadTopic::Length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(filter: &str, topic: &str) -> bool {
        TopicFilter::parse(filter).expect("a good filter").matches(topic)
    }

    #[test]
    fn filters_match_as_the_specification_says() {
        // MQTT 5.0 §4.7.1's own examples
        for topic in
            ["sport/tennis/player1", "sport/tennis/player1/ranking", "sport/tennis/player1/score/wimbledon"]
        {
            assert!(matches("sport/tennis/player1/#", topic), "{topic}");
        }
        assert!(matches("sport/#", "sport"));
        assert!(matches("#", "a/b"));
        assert!(matches("+/+", "/finance"));
        assert!(matches("/+", "/finance"));
        assert!(!matches("+", "/finance"));
        assert!(!matches("sport/+", "sport"));
        assert!(matches("sport/+", "sport/"));
        assert!(!matches("#", "$SYS/uptime"));
        assert!(!matches("+/uptime", "$SYS/uptime"));
        assert!(matches("$SYS/#", "$SYS/uptime"));
        assert!(matches("$share/group/a/+", "a/b"));
    }

    #[test]
    fn bad_filters_are_refused() {
        let bad = ["", "a/#/b", "a#", "a/b+", "$share/g", "$share//x", "$share/g+/x", "$share/g/", "a\0b"];
        for filter in bad {
            assert!(TopicFilter::parse(filter).is_err(), "{filter:?}");
        }
    }

    #[test]
    fn templates_take_levels_of_the_events_topic() {
        let template = TopicTemplate::parse("relay/{topic.1}/{node}/{function}").expect("a good template");

        let values = TopicValues { node: "gw", function: "f", topic: "sensors/7/temperature" };

        assert_eq!(template.render(values).as_deref(), Ok("relay/7/gw/f"));
        assert!(TopicTemplate::parse("a/{oops}").is_err());
        assert!(TopicTemplate::parse("a/{topic").is_err());
        assert!(TopicTemplate::parse("a/+").is_err());
        let hostile = TopicValues { topic: "sensors/+/x", ..values };
        assert_eq!(template.render(hostile), Err(BadTopic::Wildcard));
    }
}
