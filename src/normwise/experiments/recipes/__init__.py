"""Recipes for fine-tuning and long training, each measured: what keeps a network able to learn, sound after bad batches, near its start."""
