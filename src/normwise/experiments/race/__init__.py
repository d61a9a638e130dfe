"""``normwise race``: how much sooner a norm strategy reaches the tuned baseline. The protocol is docs/race.md."""
