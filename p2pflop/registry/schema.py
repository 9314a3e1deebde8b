"""The registry's one SQLite file.

Leaves, nodes, heads, certificates, schedules, entries and postings are only ever added. A request
waits in ``requests`` until it is decided and is then a row of ``members`` or ``refusals``; personal
data are in ``people`` alone, so that they can be erased without a trace in the rest. ``due_ns`` is
when the next period of a member may be issued.
"""

from __future__ import annotations

from typing import Final

FORMAT: Final = 1
FILE_NAME: Final = "registry.db"

SCHEMA: Final = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE leaves (number INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE nodes (
    level INTEGER NOT NULL, number INTEGER NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (level, number)
) WITHOUT ROWID;
CREATE TABLE heads (size INTEGER PRIMARY KEY, at_ns INTEGER NOT NULL, wire BLOB NOT NULL);
CREATE TABLE certificates (
    number INTEGER PRIMARY KEY, online_key BLOB NOT NULL, wire BLOB NOT NULL
);
CREATE INDEX certificates_of ON certificates (online_key);
CREATE TABLE schedules (number INTEGER PRIMARY KEY, wire BLOB NOT NULL);
CREATE TABLE requests (
    account BLOB PRIMARY KEY, id BLOB NOT NULL UNIQUE, wire BLOB NOT NULL, salt BLOB NOT NULL,
    subnet TEXT NOT NULL, at_ns INTEGER NOT NULL, received_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX requests_from ON requests (subnet);
CREATE INDEX requests_at ON requests (received_ns);
CREATE TABLE people (id BLOB PRIMARY KEY, personal BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE refusals (
    id BLOB PRIMARY KEY, account BLOB NOT NULL, salt BLOB NOT NULL, reason INTEGER NOT NULL,
    leaf INTEGER NOT NULL, at_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE members (
    account BLOB PRIMARY KEY, id BLOB NOT NULL UNIQUE, wire BLOB NOT NULL, salt BLOB NOT NULL,
    leaf INTEGER NOT NULL, since_ns INTEGER NOT NULL, is_revoked INTEGER NOT NULL,
    serial INTEGER NOT NULL, until_ns INTEGER NOT NULL, due_ns INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX members_due ON members (is_revoked, due_ns);
CREATE TABLE attestations (
    serial INTEGER PRIMARY KEY, account BLOB NOT NULL, leaf INTEGER NOT NULL,
    until_ns INTEGER NOT NULL, is_revoked INTEGER NOT NULL
);
CREATE INDEX attestations_of ON attestations (account, serial);
CREATE TABLE revocations (leaf INTEGER PRIMARY KEY, account BLOB NOT NULL, serial INTEGER NOT NULL);
CREATE TABLE entries (seq INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, body BLOB NOT NULL);
CREATE TABLE postings (
    account BLOB NOT NULL, kind INTEGER NOT NULL, seq INTEGER NOT NULL, place INTEGER NOT NULL,
    amount_nusd INTEGER NOT NULL, PRIMARY KEY (account, kind, seq, place)
) WITHOUT ROWID
"""
