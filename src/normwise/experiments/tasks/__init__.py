"""Real models on real data: the tasks that studies train. Every data loader stands in ``tasks.data``."""
