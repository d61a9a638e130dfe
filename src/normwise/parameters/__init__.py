"""What is in a model: every parameter once, with its role, its axes and the names that a user knows it by."""
