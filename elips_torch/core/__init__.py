"""Facts every layer shares: errors, results, metrics, checks, dispatch."""
