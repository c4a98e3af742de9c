"""One face for the tokenizers benchmarks meet: encode, decode and count, never a special token added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.base import EvalError

TokenCounter = Callable[[str], int]


def whitespace_counter(text: str) -> int:
    """Length in whitespace words; the tokenizer of the recorded conformance cases."""
    return len(text.split())


@dataclass(frozen=True)
class Tokens:
    """``encode`` text to ids and ``decode`` ids to text, both without special tokens."""

    name: str
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]

    def count(self, text: str) -> int:
        return len(self.encode(text))


def as_tokens(tokenizer: Any) -> Tokens:
    """Wrap a transformers tokenizer, a ``tokenizers.Tokenizer``, a SentencePieceProcessor or a Tokens."""
    if isinstance(tokenizer, Tokens):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    if Path(name).is_dir():  # a run may go on where the folder lies elsewhere
        name = Path(name).resolve().name
    if hasattr(backend, "encode_batch"):  # the Rust tokenizer, also inside a fast transformers tokenizer
        return Tokens(
            name,
            lambda text: backend.encode(text, add_special_tokens=False).ids,
            lambda ids: backend.decode(list(ids), skip_special_tokens=False),
        )
    if hasattr(tokenizer, "apply_chat_template"):
        return Tokens(
            name,
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
        )
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode"):
        return Tokens(name, tokenizer.encode, lambda ids: tokenizer.decode(list(ids)))
    raise EvalError(f"no tokenizer: {type(tokenizer).__name__} lacks encode(text) and decode(ids)")


def token_counter(tokenizer: Any) -> TokenCounter:
    """Turn a tokenizer, an object with ``count(text)`` or a plain function into ``text -> number of tokens``."""
    if callable(getattr(tokenizer, "count", None)):
        return tokenizer.count
    if hasattr(tokenizer, "encode"):
        return as_tokens(tokenizer).count
    if callable(tokenizer):
        return tokenizer
    raise EvalError(
        f"cannot count tokens with {type(tokenizer).__name__}: pass a tokenizer with encode(text), an object "
        "with count(text), or a function from text to a number"
    )
