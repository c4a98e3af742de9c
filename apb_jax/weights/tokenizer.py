"""A folder's tokenizer, checked when it is loaded; its begin and stop tokens are its own affair."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from apb_jax.errors import UserError
from apb_jax.json_text import parse_json
from apb_jax.weights.gguf_header import is_gguf, read_gguf_header
from apb_jax.weights.gguf_tokenizer import gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
SENTENCE = "The lighthouse is kept by Mary Quill."


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or of a GGUF file, or None where it has none.

    Raises:
        UserError: it does not load, is not of the ``tokenizers`` library, or does not give a sentence back.
    """
    if is_gguf(folder):
        own = gguf_tokenizer(read_gguf_header(folder))
        if own is not None:
            check_tokenizer(own, str(folder))
        return own
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    # transformers advises everybody without PyTorch to install it; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if _names_general_tokenizer(folder):
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {folder} does not load: {line}") from error
    check_tokenizer(tokenizer, str(folder))
    return tokenizer  # type: ignore[no-any-return]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse a tokenizer that is not data of the ``tokenizers`` library, or that loses the spaces of a sentence.

    Some versions of transformers read a byte-level ``tokenizer.json`` as if it were SentencePiece's. A vocabulary that
    lacks words of the sentence (word-level tokenizers of tests) cannot be judged by it.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"the tokenizer in {source} is a {type(tokenizer).__name__}, which is not of the tokenizers library; "
            "give a folder with a tokenizer.json"
        )
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back != SENTENCE and tokenizer.unk_token_id not in ids:
        import transformers

        raise UserError(
            f"the tokenizer in {source} turns {SENTENCE!r} into {back!r} (transformers {transformers.__version__}); "
            "install transformers>=5.24, or name another tokenizer_class in its tokenizer_config.json"
        )


def _names_general_tokenizer(folder: Path) -> bool:
    """Whether the folder asks for the class that needs nothing but tokenizer.json.

    AutoTokenizer would choose the same, after importing code of models, and PyTorch where it is installed: seconds.
    """
    config = folder / "tokenizer_config.json"
    if not config.exists() or not (folder / "tokenizer.json").exists():
        return False
    settings = parse_json(config.read_text(encoding="utf-8"))
    return isinstance(settings, dict) and settings.get("tokenizer_class") == "PreTrainedTokenizerFast"
