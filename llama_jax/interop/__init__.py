"""Weights in and out: Meta's release layout, Hugging Face safetensors, GGUF and our own checkpoints, by name tables.

A checkpoint of any format opens as a `Source` (`formats.open_source`), which knows the model's shape and every tensor's place
before it reads one; `load.load_params` streams it into sharded arrays, the `write` functions stream it into files.
"""
