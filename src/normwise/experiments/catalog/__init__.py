"""The catalogue of the studies: what is trained, under which name, and what is tuned of it. Another one is one more row."""
