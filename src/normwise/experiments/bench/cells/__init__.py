"""The parts of ``normwise bench control``: networks, rules and what you would write instead, states, and the clock."""
