"""GGUF settings as an HF ``config.json``; what the decoder does not compute is refused with its key and value.

Source of the keys: llama.cpp's ``gguf-py/gguf/constants.py`` and ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.weights.gguf_header import GGUFHeader

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Mistral's models are of architecture llama in GGUF."""

NUMBERS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
"""Keys behind the architecture's name, and what ``config.json`` calls them."""
OPTIONAL = {"attention.head_count_kv", "attention.key_length", "vocab_size", "rope.freq_base"}
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attention.max_alibi_bias": 0.0,
    "attention.clamp_kqv": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scale_linear": 1.0,
}
"""Settings that say nothing at this value; at any other they ask for something that is not computed."""
YARN = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
CHECKED = {"rope.dimension_count", "attention.value_length", "rope.scaling.type", "rope.scaling.finetuned"}
OTHER_FILES = {
    "adapter": "a LoRA adapter",
    "mmproj": "a projector of images or sound",
    "imatrix": "a table of importance",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1, 3.2 and 3.3 publish; their ``factor`` (8 or 32) is the largest divisor in ``rope_freqs.weight``."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
DIVISORS = "rope_freqs.weight"


def hf_config(header: GGUFHeader) -> dict[str, Any]:
    """The ``config.json`` of a GGUF file, without the frequencies' divisors (``with_divisors``).

    Raises:
        UserError: another architecture, a setting that is missing, of the wrong type, or not computed.
    """
    settings, file = header.settings, header.file
    _check_kind_of_file(header)
    architecture = settings.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file}: general.architecture={architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in settings.items()
        if key.startswith(f"{architecture}.")
    }
    _refuse_unknown(header, architecture, own)
    config: dict[str, Any] = {"model_type": architecture, "architectures": [_class_of(architecture)]}
    for key, name in NUMBERS.items():
        if key in own:
            config[name] = _number(header, f"{architecture}.{key}", own[key])
        elif key not in OPTIONAL:
            raise UserError(
                f"{file} lacks {architecture}.{key}; it is damaged or was not written by llama.cpp's converter"
            )
    if "vocab_size" not in config and "token_embd.weight" in header.tensors:
        config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    _check_head_dim(header, architecture, own, config)
    config["rope_theta"] = config.get("rope_theta", 10000.0)
    config["rope_scaling"] = _scaling(own)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = architecture == "llama" and "blk.0.attn_q.bias" in header.tensors
    ids = {key: settings.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", *END_KEYS)}
    config["bos_token_id"] = ids["bos_token_id"]
    ends = [ids[key] for key in END_KEYS if ids[key] is not None]
    config["eos_token_id"] = list(dict.fromkeys(ends)) or None
    return config


def model_config(header: GGUFHeader, divisors: np.ndarray | None) -> tuple[ModelConfig, dict[str, Any]]:
    """(configuration, the ``config.json`` it was read from). ``divisors``: ``rope_freqs.weight``, float32 [D/2].

    Raises:
        UserError: what ``hf_config`` or ``ModelConfig.from_hf`` refuse, with the file's name.
    """
    hf = hf_config(header)
    if divisors is not None:
        _check_divisors(header, hf, divisors)
        if divisors.max() > 1:
            hf["rope_scaling"] = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    try:
        config = ModelConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{header.file}, its settings read as a config.json: {error}") from error
    if divisors is not None:
        expected = config.rope.base_frequencies(config.head_dim) / config.rope.inv_freq(config.head_dim)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise UserError(
                f"{header.file}: {DIVISORS} {_range(divisors)} are not the divisors of the llama3 rule with "
                f"factor {divisors.max():g} ({', '.join(f'{key} {value:g}' for key, value in LLAMA3.items())}); "
                "no other rule is known for them"
            )
    return config, hf


def _check_divisors(header: GGUFHeader, hf: dict[str, Any], divisors: np.ndarray) -> None:
    if not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise UserError(
            f"{header.file}: {DIVISORS} {_range(divisors)} must be finite and positive; the file is damaged"
        )
    if hf["rope_scaling"]:
        raise UserError(f"{header.file} has both {DIVISORS} and rope.scaling.type={hf['rope_scaling']['rope_type']!r}")


def _range(values: np.ndarray) -> str:
    return f"(shape {values.shape}, {values.min():g} to {values.max():g})"


def _check_kind_of_file(header: GGUFHeader) -> None:
    settings, file = header.settings, header.file
    kind = settings.get("general.type", "model")
    if kind != "model":
        raise UserError(
            f"{file}: general.type={kind!r}: this is {OTHER_FILES.get(kind, 'no model')}; give the model's file"
        )
    if settings.get("split.count", 0) > 1:
        raise UserError(
            f"{file}: split.count={settings['split.count']}: this is one of several files; put them together first "
            "(llama-gguf-split --merge)"
        )


def _refuse_unknown(header: GGUFHeader, architecture: str, own: dict[str, Any]) -> None:
    known = NUMBERS.keys() | YARN.keys() | CHECKED
    for key, value in own.items():
        if key in known or (key in NEUTRAL and value == NEUTRAL[key]):
            continue
        usual = f"; only {NEUTRAL[key]!r} is" if key in NEUTRAL else ""
        raise UserError(
            f"{header.file}: {architecture}.{key}={_short(value)}, which this decoder does not compute{usual}"
        )


def _number(header: GGUFHeader, key: str, value: Any) -> int | float:
    if isinstance(value, list) and len(set(value)) == 1:  # one number a layer, all the same
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{header.file}: {key}={_short(value)}; one number for all layers is computed")
    # Stored in 32 bits: the shortest decimal that rounds to it is the number that was meant (1e-05).
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_head_dim(header: GGUFHeader, architecture: str, own: dict[str, Any], config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.setdefault("head_dim", config["hidden_size"] // heads if heads else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, head_dim) != head_dim:
            raise UserError(
                f"{header.file}: {architecture}.{key}={_short(own[key])}; a head has {head_dim} dimensions, and only "
                "as many are computed"
            )


def _scaling(own: dict[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` as HF spells it; ``ModelConfig.from_hf`` knows which kinds there are."""
    kind = own.get("rope.scaling.type", "linear")  # llama.cpp's default
    factor = own.get("rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    names = YARN if kind == "yarn" else {"rope.scaling.factor": "factor"}
    return {"rope_type": kind} | {name: own[key] for key, name in names.items() if key in own}


def _class_of(architecture: str) -> str:
    return f"{architecture.capitalize()}ForCausalLM"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
