-- Schema 3: copies of jobs that ended while their job went on. A release that doesn't know this
-- table leaves it alone; rows of invocations that went meanwhile are dropped at the next opening.
CREATE TABLE copies (
    invocation INTEGER NOT NULL,
    copy       INTEGER NOT NULL,
    -- Copies of another revision are others.
    revision   INTEGER NOT NULL,
    attempts   INTEGER NOT NULL,
    -- NULL: it has attempts left. `succeeded`, or its failure as JSON.
    ended      TEXT,
    PRIMARY KEY (invocation, copy)
) STRICT, WITHOUT ROWID;
