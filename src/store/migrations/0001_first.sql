-- Schema 1. Times: *_ms is the wall clock (people, `expires` across a downtime), *_node_ms is
-- node time, the accumulated uptime of the daemon (order and delays). See store/mod.rs.

-- schema, written_by, readable_by: see schema.rs. The rest is the node's own: clean, node_ms,
-- wall_ms, next_event, next_delivery (no id at or above has been given), expired, dead_dropped,
-- dropped_full, dropped_age, revisions, subscribed.*
CREATE TABLE meta (
    key   TEXT NOT NULL PRIMARY KEY,
    value ANY  NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE functions (
    -- A new id each time a function of this name is created: what a removed one left in the
    -- inbox never reaches its successor.
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    name     TEXT    NOT NULL UNIQUE,
    uid_base INTEGER NOT NULL UNIQUE,
    -- The last revision's number; counts up for ever, also after remove and create.
    revision INTEGER NOT NULL,
    paused   INTEGER NOT NULL DEFAULT 0,
    -- Path of the file in functions_dir that owns it, as bytes.
    file     BLOB,
    -- NULL: deployed. Else the row only keeps number and id range; higher: removed later.
    removed  INTEGER
) STRICT;

CREATE TABLE revisions (
    function   INTEGER NOT NULL,
    number     INTEGER NOT NULL,
    manifest   TEXT    NOT NULL,
    image      TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    PRIMARY KEY (function, number)
) STRICT, WITHOUT ROWID;

-- An event is stored once and goes with the last invocation of it. Ids are given by neap, never
-- twice: AUTOINCREMENT would dirty a page of its own in every transaction.
CREATE TABLE events (
    seq             INTEGER PRIMARY KEY,
    arrived_ms      INTEGER NOT NULL,
    arrived_node_ms INTEGER NOT NULL,
    event_id        TEXT    NOT NULL,
    source          TEXT    NOT NULL,
    type            TEXT    NOT NULL,
    subject         TEXT,
    time_ms         INTEGER,
    content_type    TEXT,
    -- JSON: {"extensions": {…}, "http": {…}}
    extras          TEXT,
    data            BLOB    NOT NULL
) STRICT;

-- The living ones. id = events.seq * 4096 + n: an event's invocations are a range of ids.
CREATE TABLE invocations (
    id         INTEGER PRIMARY KEY,
    function   INTEGER NOT NULL,
    -- 0 high, 1 normal, 2 low
    lane       INTEGER NOT NULL,
    -- Where it stands in line. Ready: its lane. Waiting for its next attempt: 16 + the node time
    -- of that. NULL: running (leased), in no line.
    place      INTEGER,
    -- Dropped when older than this at its turn.
    expires_ms INTEGER,
    attempts   INTEGER NOT NULL DEFAULT 0,
    lost       INTEGER NOT NULL DEFAULT 0,
    error      TEXT
) STRICT;

-- Ready ones of a function by lane and then by id, waiting ones by due time. Those that run are
-- left out: leasing and finishing one dirty a page less.
CREATE INDEX invocations_in_line ON invocations (function, place) WHERE place IS NOT NULL;

CREATE TABLE dead_invocations (
    id       INTEGER PRIMARY KEY,
    function INTEGER NOT NULL,
    lane     INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    lost     INTEGER NOT NULL,
    error    TEXT    NOT NULL,
    -- Head of the last failed output.
    output   BLOB    NOT NULL,
    -- What this row keeps from being freed, its event included.
    bytes    INTEGER NOT NULL
) STRICT;

CREATE INDEX dead_invocations_by_function ON dead_invocations (function);

-- `retained = "new"`: the last value seen on a topic. Lower id: changed longer ago.
CREATE TABLE retained (
    id       INTEGER PRIMARY KEY,
    function INTEGER NOT NULL,
    topic    TEXT    NOT NULL,
    hash     BLOB    NOT NULL,
    UNIQUE (function, topic)
) STRICT;

CREATE INDEX retained_by_age ON retained (function);

-- The living ones. id = queue << 56 | number, queue = target * 4 + lane (target 0 uplink, 1 local):
-- each broker's lanes are ranges of ids, each in order, without an index. People see
-- number * 8 + queue, which is the order of all (outbox.rs).
CREATE TABLE deliveries (
    id               INTEGER PRIMARY KEY,
    created_ms       INTEGER NOT NULL,
    created_node_ms  INTEGER NOT NULL,
    lone_disconnects INTEGER NOT NULL DEFAULT 0,
    -- 1: it was dead and comes again.
    replayed         INTEGER NOT NULL DEFAULT 0,
    -- Name, not id: deliveries outlive their function.
    function         TEXT,
    topic            TEXT    NOT NULL,
    event_id         TEXT    NOT NULL,
    source           TEXT    NOT NULL,
    type             TEXT    NOT NULL,
    subject          TEXT,
    time_ms          INTEGER,
    content_type     TEXT,
    extras           TEXT,
    data             BLOB    NOT NULL
) STRICT;

CREATE TABLE dead_deliveries (
    -- As people see it.
    id           INTEGER PRIMARY KEY,
    created_ms   INTEGER NOT NULL,
    reason       TEXT    NOT NULL,
    bytes        INTEGER NOT NULL,
    function     TEXT,
    topic        TEXT    NOT NULL,
    event_id     TEXT    NOT NULL,
    source       TEXT    NOT NULL,
    type         TEXT    NOT NULL,
    subject      TEXT,
    time_ms      INTEGER,
    content_type TEXT,
    extras       TEXT,
    data         BLOB    NOT NULL
) STRICT;

-- What senders gave to tell a repetition by, the last ones: lower id, longer ago.
CREATE TABLE seen (
    id       INTEGER PRIMARY KEY,
    -- Head of a SHA-256.
    key      BLOB NOT NULL,
    event_id TEXT NOT NULL
) STRICT;

-- When a schedule last fired.
CREATE TABLE ticks (
    function INTEGER NOT NULL,
    schedule TEXT    NOT NULL,
    fired_ms INTEGER NOT NULL,
    PRIMARY KEY (function, schedule)
) STRICT, WITHOUT ROWID;

-- Counted by the day of the node, one row for each kind.
CREATE TABLE usage (
    kind            TEXT    PRIMARY KEY,
    day             INTEGER NOT NULL,
    -- Node time when this day's count began.
    began_node_ms   INTEGER NOT NULL,
    amount          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
