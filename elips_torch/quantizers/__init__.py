"""Modules that learn a code for vectors: centroids, codebooks, ranges."""
