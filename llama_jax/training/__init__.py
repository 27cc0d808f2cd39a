"""The one training loop and its parts: stages, state, optimiser, losses, step, checkpoints and metrics.

Nothing in here knows a model or a task: a stage brings its parameters, its loss (sums and weights) and its
source.
"""
