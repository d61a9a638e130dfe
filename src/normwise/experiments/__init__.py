"""Experiments: which policy helps on a task, by how much, at what cost."""
