"""Text to arrays: tokenizer, chat encoding, JSONL sources, packing and loaders (paper sections 2.1, 3.1 and 3.3).

Level 1 of the house: imports jax, flax and grain, never `model` or `training`.
"""
