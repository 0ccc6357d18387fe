"""An index on disk: its files, how they are built, read, appended to and merged."""
