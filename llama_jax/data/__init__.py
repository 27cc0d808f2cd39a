"""Text to arrays: tokenizer, chat encoding, JSONL sources, packing, loaders (paper sections 2 and 3).

Level 1 of the house: imports jax, flax and grain, never `model` or `training`.
"""
