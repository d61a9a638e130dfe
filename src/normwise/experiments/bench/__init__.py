"""Benchmarks, one module each. To add one, add a file: see ``runner``."""
