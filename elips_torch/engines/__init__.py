"""Other search libraries, each imported in its own folder only."""
