-- Snapshots, in the order in which they came: the newest has the highest position.
-- `position` is the row id, so that each index below is also sorted by it.
CREATE TABLE snapshots (
    position            INTEGER PRIMARY KEY AUTOINCREMENT,
    id                  TEXT NOT NULL UNIQUE,
    source_instance_id  TEXT NOT NULL,
    name                TEXT,
    kind                TEXT NOT NULL,
    document            TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX snapshots_source_name ON snapshots(source_instance_id, name) WHERE name IS NOT NULL;
CREATE INDEX snapshots_source ON snapshots(source_instance_id);
CREATE INDEX snapshots_name ON snapshots(name) WHERE name IS NOT NULL;
CREATE INDEX snapshots_kind ON snapshots(kind);

CREATE TABLE snapshot_tags (
    key         TEXT NOT NULL,
    value       TEXT NOT NULL,
    position    INTEGER NOT NULL REFERENCES snapshots(position) ON DELETE CASCADE,
    PRIMARY KEY (key, value, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX snapshot_tags_position ON snapshot_tags(position);

-- Where the last deleted snapshots were: whoever deletes a page of a list can still ask for the next one.
CREATE TABLE snapshot_traces (
    number      INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT NOT NULL UNIQUE,
    position    INTEGER NOT NULL
) STRICT;

-- Schedules outlive their instances; times are milliseconds since 1970.
CREATE TABLE schedules (
    instance_id TEXT PRIMARY KEY,
    next_run_at INTEGER NOT NULL,
    document    TEXT NOT NULL
) STRICT;
CREATE INDEX schedules_next_run_at ON schedules(next_run_at);
