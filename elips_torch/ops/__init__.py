"""The public operations and their registration with torch."""
