"""The recipe of the Llama 2 paper in pure-functional JAX, from raw text to an aligned chat model.

Importing this package imports nothing else; the README lists every file with one line and says where to start
reading.
"""

__version__ = "0.1.0"
