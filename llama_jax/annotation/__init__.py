"""The desk at which people compare and rate answers (paper sections 3.2.1, 3.4.2 and 4.4), behind `llama_jax.desk`."""
