"""``normwise prune``: from a smaller norm to a smaller model."""
