"""``normwise tune``: a search over rules, optimizers and rates, whose answer is judged on fresh seeds. The protocol is in docs/tune.md."""
