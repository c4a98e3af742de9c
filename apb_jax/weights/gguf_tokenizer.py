"""The tokenizer and chat template of a GGUF file, built with the ``tokenizers`` library from its settings.

transformers reads GGUF tokenizers too, but only with PyTorch, and without SmolLM's split of digits and Qwen2's NFC.
Source of the splits: llama.cpp's ``llama-vocab.cpp``; tests hold them against the tokenizers of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from apb_jax.errors import UserError
from apb_jax.weights.gguf_header import GGUFHeader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL, USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type``: control tokens are special, a user's own are matched whole in any text."""
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _END
QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _END
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _END
)


@dataclass(frozen=True)
class Split:
    """How text falls into words before byte pairs are merged. Without ``pattern``: GPT-2's own."""

    pattern: str | None = None
    digits: bool = False
    """Whether every digit stands alone."""
    whole_words: bool = False
    """Whether a word of the vocabulary is taken as it is, without merges."""
    nfc: bool = False
    """Whether text is brought to Unicode's composed form first."""
    begins: bool = False
    """Whether a begin token is added where the file does not say."""

    def pre_tokenizer(self) -> Any:
        """The pipeline of the ``tokenizers`` library."""
        if self.pattern is None:
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words]) if self.digits else words
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


SPLITS = {
    "gpt-2": Split(),
    "gpt2": Split(),
    "smollm": Split(digits=True),
    "llama-bpe": Split(LLAMA3, whole_words=True, begins=True),
    "llama3": Split(LLAMA3, whole_words=True, begins=True),
    "llama-v3": Split(LLAMA3, whole_words=True, begins=True),
    "qwen2": Split(QWEN2, nfc=True),
    "deepseek-r1-qwen": Split(QWEN2),
    "tekken": Split(TEKKEN, whole_words=True, begins=True),
}
"""By ``tokenizer.ggml.pre``."""
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(header: GGUFHeader) -> PreTrainedTokenizerBase | None:
    """The file's tokenizer with its chat template; None where the file has none.

    Raises:
        UserError: a kind of tokenizer or of splitting that is not known; tables that do not fit together.
    """
    # The class itself, not AutoTokenizer: that imports the code of models, and PyTorch where it is installed.
    from transformers import PreTrainedTokenizerFast

    settings = header.settings
    kind = settings.get("tokenizer.ggml.model")
    if kind in (None, "none"):
        return None
    vocabulary = _vocabulary(header)
    if kind == "gpt2":
        built, begins = _byte_level(header, vocabulary)
    elif kind == "llama":
        built, begins = _sentencepiece(header, vocabulary), True
    else:
        raise UserError(
            f"{header.file}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2 (byte-level), "
            "llama (SentencePiece)"
        )
    _add_whole_tokens(built, header)
    tokens = settings["tokenizer.ggml.tokens"]
    names = {name: _token(header, tokens, f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=settings.get("tokenizer.chat_template"),
        add_bos_token=bool(settings.get("tokenizer.ggml.add_bos_token", begins)) and names["bos_token"] is not None,
        add_eos_token=bool(settings.get("tokenizer.ggml.add_eos_token", False)) and names["eos_token"] is not None,
        clean_up_tokenization_spaces=False,
        **names,
    )


def _vocabulary(header: GGUFHeader) -> dict[str, int]:
    tokens = _table(header, "tokenizer.ggml.tokens", str)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise UserError(f"{header.file}: tokenizer.ggml.tokens holds {twice!r} twice; the file is damaged")
    return vocabulary


def _table(header: GGUFHeader, key: str, kind: Any, length: int | None = None) -> list[Any]:
    table = header.settings.get(key)
    if not isinstance(table, list) or not table or not isinstance(table[0], kind):
        raise UserError(f"{header.file}: {key} is missing or no list of the right type; the tokenizer cannot be built")
    if length is not None and len(table) != length:
        raise UserError(f"{header.file}: {key} has {len(table)} values for {length} tokens; the file is damaged")
    return table


def _token(header: GGUFHeader, tokens: list[str], key: str) -> str | None:
    index = header.settings.get(key)
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise UserError(f"{header.file}: {key}={index!r} is no id of its {len(tokens)} tokens")
    return tokens[index]


def _byte_level(header: GGUFHeader, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """(tokenizer, whether it adds a begin token where the file does not say)."""
    name = header.settings.get("tokenizer.ggml.pre")
    split = SPLITS.get(str(name))
    if split is None:
        raise UserError(
            f"{header.file}: tokenizer.ggml.pre={name!r} is not supported; supported: {', '.join(SPLITS)} "
            "(an HF folder of the model brings its own tokenizer)"
        )
    pairs = [tuple(pair.split(" ", 1)) for pair in _table(header, "tokenizer.ggml.merges", str)]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in vocabulary or pair[1] not in vocabulary or "".join(pair) not in vocabulary:
            raise UserError(f"{header.file}: tokenizer.ggml.merges has {pair!r}, whose parts or sum are no tokens")
    built = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.whole_words, byte_fallback=False))
    built.normalizer = normalizers.NFC() if split.nfc else None
    built.pre_tokenizer = split.pre_tokenizer()
    built.decoder = decoders.ByteLevel()
    return built, split.begins


def _sentencepiece(header: GGUFHeader, vocabulary: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE: merges follow from the pieces' scores, spaces are written U+2581.

    ``tokenizer.ggml.add_space_prefix`` (absent: true): every text, and what follows a special token, gets a space.
    """
    from transformers.tokenization_utils_base import generate_merges

    scores = _table(header, "tokenizer.ggml.scores", float, len(vocabulary))
    kinds = _table(header, "tokenizer.ggml.token_type", int, len(vocabulary))
    whole = [token for token, kind in zip(vocabulary, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    merges = generate_merges(vocabulary, dict(zip(vocabulary, scores, strict=True)), skip_tokens=whole)
    unknown = _token(header, list(vocabulary), "tokenizer.ggml.unknown_token_id")
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(header.settings.get("tokenizer.ggml.add_space_prefix", True))
    # As SentencePiece and llama.cpp: one space more in front, also where the text begins with one.
    spaces = normalizers.Replace(" ", "\u2581")
    built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return built


def _add_whole_tokens(built: Tokenizer, header: GGUFHeader) -> None:
    """Control tokens as special ones, the user's own as plain ones; neither is ever cut."""
    tokens = header.settings["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.token_type" not in header.settings:
        return
    kinds = _table(header, "tokenizer.ggml.token_type", int, len(tokens))
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    own = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    built.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
