-- Schema 2: how a function's last revisions came to be. By name: numbers are never reused for
-- one, also after remove and create. A release that doesn't know this table leaves it alone.
CREATE TABLE revision_notes (
    function    TEXT    NOT NULL,
    number      INTEGER NOT NULL,
    -- It succeeded once; it is on trial no more.
    proven      INTEGER NOT NULL DEFAULT 0,
    -- The newer revision whose place it took, and why.
    instead_of  INTEGER,
    reason      TEXT,
    PRIMARY KEY (function, number)
) STRICT, WITHOUT ROWID;
