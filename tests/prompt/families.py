"""Chat templates of published families, in short: what each writes around one exchange (facts of the formats)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LLAMA31 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
CHATML = _CHATML + "{% endif %}"
CHATML_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
QWEN3 = (
    _CHATML + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + gap + system + m.content + end + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = "{% set gap = ' ' %}{% set end = ' ' %}" + _MISTRAL
MISTRAL_V3 = "{% set gap = ' ' %}{% set end = '' %}" + _MISTRAL
MISTRAL_V7 = "{% set gap = '' %}{% set end = '' %}" + _MISTRAL
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Without any special token, as Vicuna's."""


@dataclass(frozen=True)
class Family:
    """A template, the kind of tokenizer it comes with, and what ends an answer."""

    template: str
    kind: str = "bytes"
    end: str | None = None
    system: bool = True


FAMILIES = {
    "llama3.1": Family(LLAMA31, end="<|eot_id|>"),
    "chatml": Family(CHATML, end="<|im_end|>"),
    "chatml with a system text": Family(CHATML_SYSTEM, end="<|im_end|>"),
    "qwen3": Family(QWEN3, end="<|im_end|>"),
    "mistral v0.1": Family(MISTRAL_V1, "mistral", "</s>"),
    "mistral v0.3": Family(MISTRAL_V3, "mistral", "</s>"),
    "mistral without spaces": Family(MISTRAL_V7, "mistral", "</s>"),
    "gemma": Family(GEMMA, "spaces", "<end_of_turn>", system=False),
    "no special tokens": Family(PLAIN),
}
SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>",
    "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]",
]  # fmt: skip
CORPUS = [
    "The lighthouse on Gull Point is kept by Mary Quill. Who keeps the lighthouse?\n\nNobody else lives there.\n",
    "user system assistant model\nToday Date: 26 Jul 2024\n\nBe kind. Answer in one word.\n",
    "def keep(light):\r\n    return light['on'] and 8675309  # INST im_end eot_id\n",
] * 4


def byte_level() -> PreTrainedTokenizerBase:
    """Llama 3's and Qwen's kind: bytes, nothing put in front of words; ``<think>`` added, but not as special."""
    made = Tokenizer(models.BPE())
    split = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, True, False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>", "</think>"])
    begin = "<|begin_of_text|>"
    made.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token="<|end_of_text|>")


def space_level() -> PreTrainedTokenizerBase:
    """Gemma's kind: letters with a mark for the space, single bytes for what is unknown, nothing put in front."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trained = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trained)
    # Bytes are letters of the model, not tokens that a text could name.
    state = json.loads(made.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral(folder: Path) -> PreTrainedTokenizerBase:
    """Mistral v0.3's own tokenizer, as transformers reads the SentencePiece file that mistral-common ships."""

    common = pytest.importorskip("mistral_common")
    file = Path(common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(file, folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "legacy": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
