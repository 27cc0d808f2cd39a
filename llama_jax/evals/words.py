"""Which tokenizer reads a model: the one beside its weights, else the one that a command names, if it is the model's own."""

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.formats import open_source
from llama_jax.interop.tokenizer_files import check_vocabulary, open_tokenizer


def tokenizer_of(place: str, given: str | None) -> str | None:
    """What `llama_jax.load` is to be told of the tokenizer of the model at `place`: nothing where one lies beside the weights,
    so that several models may be named together, of which some have their own. Reads no weights.

    Raises:
      ValueError, FileNotFoundError: no model, no tokenizer, or another one than the model was trained with.
    """
    source = open_source(place)
    if source.tokenizer is not None:
        return None
    if not given:
        raise ValueError(f"{place}: missing tokenizer: --tokenizer names one")
    check_vocabulary(Tokenizer(given), source)
    return given


def words_of(place: str, given: str | None) -> Tokenizer:
    """The tokenizer of the model at `place`: the one beside its weights, else the one `given`. Raises as `tokenizer_of`."""
    source = open_source(place)
    return open_tokenizer(source, tokenizer_of(place, given) or source.tokenizer)
