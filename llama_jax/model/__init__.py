"""The Llama 2 transformer: plain functions over one table of parameters. No other package of the middle row is imported."""
