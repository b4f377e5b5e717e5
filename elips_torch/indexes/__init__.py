"""The indexes."""
