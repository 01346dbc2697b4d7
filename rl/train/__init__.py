"""From experience to better weights: batching, learner, trainer, cold start, evaluation, checkpoints, metrics,
report."""
