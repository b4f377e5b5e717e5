"""Modules that learn a coarser form of vectors: clusters, codes, linear maps."""
