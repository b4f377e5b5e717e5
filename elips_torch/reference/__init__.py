"""The obvious, slow, correct version of every operation, for tests and readers."""
