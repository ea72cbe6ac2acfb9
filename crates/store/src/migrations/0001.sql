CREATE TABLE instances (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    document    TEXT NOT NULL
) STRICT;

-- Root disks by the digest of the platform's manifest; several references may point to one.
CREATE TABLE image_contents (
    digest      TEXT PRIMARY KEY,
    document    TEXT NOT NULL
) STRICT;

CREATE TABLE image_references (
    name        TEXT PRIMARY KEY,
    digest      TEXT NOT NULL REFERENCES image_contents(digest),
    document    TEXT NOT NULL
) STRICT;
CREATE INDEX image_references_digest ON image_references(digest);

-- What the registry serves. The manifest itself is a blob.
CREATE TABLE registry_manifests (
    repository  TEXT NOT NULL,
    digest      TEXT NOT NULL,
    media_type  TEXT NOT NULL,
    size        INTEGER NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;

CREATE TABLE registry_tags (
    repository  TEXT NOT NULL,
    tag         TEXT NOT NULL,
    digest      TEXT NOT NULL,
    PRIMARY KEY (repository, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX registry_tags_digest ON registry_tags(repository, digest);

-- Operations whose intent is recorded and whose outcome is not yet.
CREATE TABLE journal (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    subject     TEXT NOT NULL,
    operation   TEXT NOT NULL
) STRICT;
CREATE INDEX journal_subject ON journal(subject);
