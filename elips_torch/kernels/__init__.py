"""How operations are computed."""
