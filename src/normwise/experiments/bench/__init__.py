"""Benchmarks: one module each, with a function ``run()`` that gives ``{"rows": [{...}, ...]}``."""
