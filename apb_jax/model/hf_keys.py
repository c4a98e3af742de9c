"""The keys of an HF ``config.json``: which are read, which are harmless and why; every other one is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from apb_jax.errors import UserError

READ = frozenset(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps max_position_embeddings tie_word_embeddings bos_token_id eos_token_id "
    "rope_theta rope_scaling rope_parameters original_max_position_embeddings "
    "sliding_window use_sliding_window max_window_layers layer_types no_rope_layers no_rope_layer_interval".split()
)
"""What ``ModelConfig.from_hf`` computes with."""

ONLY: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "SwiGLU's 'silu'"),
    "attention_bias": (False, "false: no biases but those of Qwen2's q, k and v"),
    "mlp_bias": (False, "false"),
    "partial_rotary_factor": (1, "1, the whole head rotated"),
    "quantization_config": (None, "weights in bf16, f16 or f32: take the unquantised checkpoint"),
    "auto_map": (None, "models of transformers' own code, without code beside the weights"),
    "is_encoder_decoder": (False, "false"),
    "add_cross_attention": (False, "false"),
    "tie_encoder_decoder": (False, "false"),
    "pruned_heads": ({}, "{}"),
    "use_mrope": (False, "false"),
    "rope_interleaved": (False, "false"),
    "mlp_only_layers": ([], "[]"),
}
"""Keys that would change the numbers: the value that does not, and what is supported in words."""

HARMLESS: dict[str, frozenset[str]] = {
    "names, versions and storage; say nothing about the mathematics": frozenset(
        "architectures _name_or_path name_or_path transformers_version torch_dtype dtype use_bfloat16 tokenizer_class "
        "unsloth_version unsloth_fixed _commit_hash is_llama_config transformers.js_config".split()
    ),
    "training alone": frozenset(
        "attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop initializer_range gradient_checkpointing "
        "neftune_noise_alpha pretraining_tp".split()
    ),
    "how transformers runs it, with the same result": frozenset(
        "use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_autoset "
        "_flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 torchscript return_dict "
        "use_return_dict output_attentions output_hidden_states chunk_size_feed_forward tf_legacy_loss low_memory "
        "is_decoder".split()
    ),
    "sampling and other tokens, which generation settings decide": frozenset(
        "pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id prefix "
        "forced_bos_token_id forced_eos_token_id max_length min_length do_sample temperature top_k top_p typical_p "
        "repetition_penalty length_penalty diversity_penalty num_beams num_beam_groups num_return_sequences "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size exponential_decay_length_penalty early_stopping "
        "bad_words_ids suppress_tokens begin_suppress_tokens remove_invalid_values output_scores "
        "return_dict_in_generate".split()
    ),
    "lengths that tools beside transformers read": frozenset(
        "max_sequence_length model_max_length max_seq_len seq_length".split()
    ),
    "labels of classifiers": frozenset(
        "id2label label2id num_labels problem_type finetuning_task task_specific_params".split()
    ),
    "width of retaining heads, which their own tensors give": frozenset({"retaining_intermediate_size"}),
}
"""Why a key is ignored, and the keys."""


def check_keys(hf: Mapping[str, Any]) -> None:
    """Refuse the first key that may change the numbers; null switches nothing on and is always harmless."""
    ignored = frozenset().union(*HARMLESS.values())
    for name, value in hf.items():
        if value is None or name in READ or name in ignored:
            continue
        if name not in ONLY:
            raise UserError(
                f"config.json has the key {name}={_short(value)}, which is not known and may change the model; "
                "delete it if it does not (supported keys: docs/models.md)"
            )
        right, words = ONLY[name]
        if value != right or isinstance(value, bool) != isinstance(right, bool):
            raise UserError(f"config.json has {name}={_short(value)}, which is not computed; supported: {words}")


def whole(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number; absent or null: the default, and without one an error."""
    value = hf.get(name)
    if value is None:
        if default is None:
            raise UserError(f"config.json lacks {name!r}")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise UserError(f"config.json has {name}={_short(value)}; it must be a whole number")
    return int(value)


def real(hf: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number; absent or null: the default."""
    value = hf.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"config.json has {name}={_short(value)}; it must be a finite number")
    return float(value)


def switch(hf: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false; absent or null: the default."""
    value = hf.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json has {name}={_short(value)}; it must be true or false")
    return default if value is None else value


def token_ids(hf: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One id or a list of them; absent or null: none."""
    value = hf.get(name)
    given = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in given):
        raise UserError(f"config.json has {name}={_short(value)}; it must be a token id or a list of them")
    return tuple(given)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else text[:117] + "..."
