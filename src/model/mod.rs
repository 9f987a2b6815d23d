//! The nouns of neap, as data: no I/O, no clock of its own, no randomness.
//!
//! Every other module may use this one; it uses none of them. One noun per file:
//! ids, event (and cloudevents, its JSON), function (manifest and revision), permissions, reach, outcome, delivery,
//! lane, image, schedule (cron), zone, time.

pub mod api;
pub mod callback;
pub mod cloudevents;
pub mod delivery;
pub mod event;
pub mod function;
pub mod id;
pub mod image;
pub mod lane;
pub mod outcome;
pub mod permissions;
pub mod prelude;
pub mod reach;
pub mod schedule;
pub mod time;
pub mod topic;
pub mod zone;

pub use delivery::{Delivery, NewDelivery, Target};
pub use event::{Event, HttpRequest};
pub use function::{Manifest, Revision};
pub use id::{DeliveryId, EventId, EventSeq, FunctionName, InvocationId};
pub use image::{Digest, Reference};
pub use lane::Lane;
pub use outcome::{CopyProgress, Failure, Outcome};
pub use permissions::{Permissions, SecretName};
pub use schedule::Schedule;
pub use time::{Clock, SystemClock, UnixMs};
pub use topic::{TopicFilter, TopicTemplate, TopicValues};
