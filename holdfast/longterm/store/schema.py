"""The tables of a memory, as numbered migrations that both engines understand.

`{serial}`, `{blob}` and `{big}` stand for the engine's types. A migration is never edited once
released: a change of the schema is one more entry.
"""

MIGRATIONS: list[str] = [
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE space (
        id {serial}, tenant TEXT NOT NULL, user_id TEXT NOT NULL, agent_id TEXT NOT NULL,
        run_id TEXT NOT NULL, seq {big} NOT NULL DEFAULT 0,
        UNIQUE (tenant, user_id, agent_id, run_id)
    );
    CREATE TABLE event (
        space {big} NOT NULL REFERENCES space (id), seq {big} NOT NULL, time {big} NOT NULL,
        actor TEXT NOT NULL, op TEXT NOT NULL, item TEXT NOT NULL, before TEXT, after TEXT,
        why TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (space, seq)
    );
    CREATE INDEX event_item ON event (item, seq);
    CREATE TABLE memory (
        version {serial}, id TEXT NOT NULL, space {big} NOT NULL REFERENCES space (id),
        kind TEXT NOT NULL, text TEXT NOT NULL, speaker TEXT, session TEXT,
        position {big} NOT NULL, data TEXT NOT NULL, metadata TEXT NOT NULL,
        valid_from {big}, valid_to {big}, recorded_at {big} NOT NULL, retired_at {big},
        strength DOUBLE PRECISION NOT NULL DEFAULT 1, uses {big} NOT NULL DEFAULT 0,
        used_at {big}, text_hash {blob} NOT NULL, key_hash {blob} NOT NULL,
        searchable INTEGER NOT NULL DEFAULT 1, terms TEXT
    );
    CREATE UNIQUE INDEX memory_current ON memory (id) WHERE retired_at IS NULL;
    CREATE INDEX memory_id ON memory (id, version);
    CREATE INDEX memory_key ON memory (space, key_hash);
    CREATE INDEX memory_text ON memory (space, text_hash);
    CREATE INDEX memory_position ON memory (space, position);
    CREATE INDEX memory_kind ON memory (space, kind, position);
    CREATE INDEX memory_session ON memory (space, session, position);
    CREATE TABLE edge (
        id TEXT PRIMARY KEY, space {big} NOT NULL REFERENCES space (id), src TEXT NOT NULL,
        rel TEXT NOT NULL, dst TEXT NOT NULL, data TEXT NOT NULL, valid_from {big},
        valid_to {big}, recorded_at {big} NOT NULL, retired_at {big}
    );
    CREATE INDEX edge_src ON edge (space, src, rel);
    CREATE INDEX edge_dst ON edge (space, dst, rel);
    CREATE TABLE source (
        memory TEXT NOT NULL, origin TEXT NOT NULL, start_byte {big}, end_byte {big}
    );
    CREATE INDEX source_memory ON source (memory);
    CREATE INDEX source_origin ON source (origin);
    CREATE TABLE model (id {serial}, name TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL);
    CREATE TABLE embedding (
        version {big} NOT NULL REFERENCES memory (version), model {big} NOT NULL
        REFERENCES model (id), part INTEGER NOT NULL, bytes {blob} NOT NULL,
        PRIMARY KEY (version, model, part)
    );
    """,
    # `shelf` repeats `data["shelf"]`, so that a policy finds what it has put there.
    """
    ALTER TABLE memory ADD COLUMN shelf TEXT;
    CREATE INDEX memory_shelf ON memory (space, kind, shelf, position)
        WHERE shelf IS NOT NULL AND retired_at IS NULL;
    """,
]

# Parts of an embedding: of the text itself, of the turns around it, and the signs of its tokens.
OWN, WINDOW, TOKENS = 0, 1, 2
