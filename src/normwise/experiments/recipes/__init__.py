"""Recipes for fine-tuning and long training, each measured: what keeps a network able to learn, alive after bad batches, or near its start."""
