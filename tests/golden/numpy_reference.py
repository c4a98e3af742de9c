"""APB and plain causal attention once more, in numpy alone: what the recordings in ``tests/recorded`` were made with.

``python tests/golden/numpy_reference.py`` writes them anew: a random Llama of float32 weights and, for each case, ids,
selections, caches, logits and tokens. Nothing of ``apb_jax`` is imported; all is computed in float64, host after host
and layer after layer, as arXiv 2502.12085 and thunlp/APB describe it, and stored in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORDED = Path(__file__).resolve().parent.parent / "recorded"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "retaining_intermediate_size": 12,
}  # fmt: skip
DOCUMENT, QUERY, STEPS = 64, 5, 6
POOL = 5
CASES: dict[str, dict[str, Any]] = {
    "apb_numpy_h4": {"method": "apb", "hosts": 4, "anchor_len": 8, "topk": 4, "query_insert_pos": 2},
    "full_numpy": {"method": "full"},
}
Floats = NDArray[np.float64]
Ids = NDArray[np.int32]


def weights(seed: int = 5) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors of the model, of the retaining heads) under their HF names, float32."""
    rng = np.random.default_rng(seed)
    c = CONFIG
    hidden, dim = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (c["intermediate_size"], hidden),
        "mlp.up_proj": (c["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, c["intermediate_size"]),
    }

    def draw(*shape: int) -> Any:
        return (1.5 * rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    def norm() -> Any:
        return (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32)

    model = {"model.embed_tokens.weight": 4 * draw(c["vocab_size"], hidden), "model.norm.weight": norm(),
             "lm_head.weight": draw(c["vocab_size"], hidden)}  # fmt: skip
    heads = {}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        model |= {f"{at}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        model |= {f"{at}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        heads[f"{at}.self_attn.fc1.weight"] = draw(c["retaining_intermediate_size"], q + 2 * kv)
        heads[f"{at}.self_attn.fc2.weight"] = draw(c["num_key_value_heads"], c["retaining_intermediate_size"])
    return model, heads


@dataclass
class Llama:
    """The model around an attention that the caller supplies."""

    tensors: dict[str, Any]
    heads: dict[str, Any]

    def weight(self, layer: int, name: str) -> Floats:
        return np.asarray((self.tensors | self.heads)[f"model.layers.{layer}.{name}.weight"], np.float64)

    def norm(self, x: Floats, name: str) -> Floats:
        scale = np.asarray(self.tensors[name], np.float64)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * scale

    def embed(self, ids: Ids) -> Floats:
        return np.asarray(self.tensors["model.embed_tokens.weight"], np.float64)[ids]

    def project(self, layer: int, x: Floats) -> tuple[Floats, Floats, Floats]:
        """q, k, v [rows, heads, D] before RoPE."""
        normed = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
        parts = (normed @ self.weight(layer, f"self_attn.{n}_proj").T for n in "qkv")
        q, k, v = (part.reshape(len(x), -1, CONFIG["head_dim"]) for part in parts)
        return q, k, v

    def after_attention(self, layer: int, x: Floats, out: Floats) -> Floats:
        """The output projection and the FFN with their residuals."""
        x = x + out.reshape(len(x), -1) @ self.weight(layer, "self_attn.o_proj").T
        normed = self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gated = silu(normed @ self.weight(layer, "mlp.gate_proj").T) * (normed @ self.weight(layer, "mlp.up_proj").T)
        return x + gated @ self.weight(layer, "mlp.down_proj").T

    def logits(self, x: Floats) -> Floats:
        return self.norm(x, "model.norm.weight") @ np.asarray(self.tensors["lm_head.weight"], np.float64).T

    def scores(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        """Retaining head: fc2(silu(fc1(concat(q, k, v)))) [rows, KV], all before RoPE."""
        both = np.concatenate([part.reshape(len(q), -1) for part in (q, k, v)], axis=1)
        return silu(both @ self.weight(layer, "self_attn.fc1").T) @ self.weight(layer, "self_attn.fc2").T


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def rotated(x: Floats, positions: Ids) -> Floats:
    """RoPE on halves: pairs (i, i + D / 2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * CONFIG["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q: Floats, k: Floats, v: Floats, seen: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """(out [rows, H, D], lse [H, rows]) of softmax attention; ``seen`` [rows, keys]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.where(seen, np.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, -np.inf)
    top = logits.max(-1, keepdims=True)
    weight = np.exp(logits - top)
    total = weight.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weight / total, v), (top + np.log(total))[..., 0]


def causal(rows: int, before: int = 0) -> NDArray[np.bool_]:
    """Rows that see ``before`` keys and, behind them, themselves and earlier rows."""
    return np.tril(np.ones((rows, before + rows), bool), before)


def pooled(raw: Floats) -> Floats:
    """Maximum over rows t - 2 to t + 2, the window cut at both ends."""
    half = POOL // 2
    return np.stack([raw[max(0, t - half) : t + half + 1].max(0) for t in range(len(raw))])


def apb_prefill(model: Llama, document: Ids, query: Ids, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Every host's arrays, layers first, under the names of the recordings (``recorded/README.md``)."""
    hosts, anchor, top, place = (case[name] for name in ("hosts", "anchor_len", "topk", "query_insert_pos"))
    block = len(document) // hosts
    opening = np.concatenate([document[:place], query, document[place : anchor - len(query)]])
    ids, positions, states = [], [], []
    for host in range(hosts):
        lead = opening if host else opening[:0]
        ids.append(np.concatenate([lead, document[host * block : (host + 1) * block]]).astype(np.int32))
        positions.append(np.concatenate([np.arange(len(lead)), host * block + np.arange(block)]).astype(np.int32))
        states.append(model.embed(ids[-1]))
    found: list[dict[str, Any]] = [
        {"input_ids": i, "position_ids": p, "scores_pooled": [], "topk_idx": [], "attn_out": [], "cache_k": [],
         "cache_v": []} for i, p in zip(ids, positions, strict=True)
    ]  # fmt: skip
    for layer in range(CONFIG["num_hidden_layers"]):
        passed_k: list[Floats] = []
        passed_v: list[Floats] = []
        for host, mine in enumerate(found):
            q, k, v = model.project(layer, states[host])
            scores = pooled(model.scores(layer, q, k, v))
            mine["scores_pooled"].append(scores.copy())
            scores[:anchor] = np.finfo(np.float32).min  # on host 0, too, where they are the document's start
            chosen = np.argsort(-scores, axis=0, kind="stable")[:top]
            mine["topk_idx"].append(chosen.astype(np.int32))
            q, k = rotated(q, positions[host]), rotated(k, positions[host])
            lead = len(states[host]) - block
            before_k, before_v = (
                np.concatenate(parts) if parts else np.zeros((0, *k.shape[1:])) for parts in (passed_k, passed_v)
            )
            seen = causal(len(q), len(before_k))
            seen[:lead, : len(before_k)] = False  # the anchor sees itself alone
            out, _ = attention(q, np.concatenate([before_k, k]), np.concatenate([before_v, v]), seen)
            mine["attn_out"].append(out)
            mine["cache_k"].append(k[lead:])
            mine["cache_v"].append(v[lead:])
            passed_k.append(np.take_along_axis(k, chosen[..., None], axis=0))
            passed_v.append(np.take_along_axis(v, chosen[..., None], axis=0))
            states[host] = model.after_attention(layer, states[host], out)
    for mine, state in zip(found, states, strict=True):
        mine["final_hidden"] = model.norm(state, "model.norm.weight")
    return found


def answer(
    model: Llama, cache: list[tuple[Floats, Floats]], first_position: int, query: Ids
) -> tuple[Floats, list[int], Floats]:
    """Greedy: (logits of the query's rows, tokens, logits each token was taken from) over the cached K and V."""
    cache, tokens, steps = list(cache), [], []
    ids, query_logits = query, None
    for _ in range(STEPS):
        x = model.embed(ids)
        positions = (first_position + np.arange(len(ids))).astype(np.int32)
        for layer, (k_old, v_old) in enumerate(cache):
            q, k, v = model.project(layer, x)
            k, v = np.concatenate([k_old, rotated(k, positions)]), np.concatenate([v_old, v])
            cache[layer] = (k, v)
            out, _ = attention(rotated(q, positions), k, v, causal(len(ids), len(k_old)))
            x = model.after_attention(layer, x, out)
        logits = model.logits(x)
        query_logits = logits if query_logits is None else query_logits
        steps.append(logits[-1])
        tokens.append(int(logits[-1].argmax()))
        first_position, ids = first_position + len(ids), np.asarray([tokens[-1]], np.int32)
    assert query_logits is not None
    return query_logits, tokens, np.stack(steps)


def full_prefill(model: Llama, document: Ids) -> list[tuple[Floats, Floats]]:
    """K and V of every layer under plain causal attention."""
    x, positions, cache = model.embed(document), np.arange(len(document), dtype=np.int32), []
    for layer in range(CONFIG["num_hidden_layers"]):
        q, k, v = model.project(layer, x)
        k = rotated(k, positions)
        cache.append((k, v))
        x = model.after_attention(layer, x, attention(rotated(q, positions), k, v, causal(len(document)))[0])
    return cache


def run(case: dict[str, Any], document: Ids, query: Ids) -> dict[str, dict[str, Any]]:
    """Files of a case by name, each a table of arrays."""
    model = Llama(*weights())
    files: dict[str, dict[str, Any]] = {"inputs": {"doc_ids": document, "query_ids": query}}
    if case["method"] == "apb":
        ranks = apb_prefill(model, document, query, case)
        files |= {f"rank{host}": found for host, found in enumerate(ranks)}
        cache = [
            tuple(np.concatenate([found[name][layer] for found in ranks]) for name in ("cache_k", "cache_v"))
            for layer in range(CONFIG["num_hidden_layers"])
        ]
    else:
        cache = full_prefill(model, document)
    logits, tokens, steps = answer(model, cache, len(document), query)  # type: ignore[arg-type]
    said = {"tokens": np.asarray(tokens, np.int32), "step_logits": steps}
    if case["method"] == "apb":
        files["query_allkeys"] = said | {"query_logits": logits}
    else:
        files["full"] = said | {f"cache_{n}": np.stack([kv[i] for kv in cache]) for i, n in enumerate("kv")}

    def stored(value: Any) -> Any:
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    return {name: {key: stored(value) for key, value in table.items()} for name, table in files.items()}


def inputs() -> tuple[Ids, Ids]:
    """Document and query."""
    rng = np.random.default_rng(17)
    document, query = (rng.integers(3, CONFIG["vocab_size"], n).astype(np.int32) for n in (DOCUMENT, QUERY))
    return document, query


def record(folder: Path) -> None:
    """Write the model and every case."""
    from safetensors.numpy import save_file

    model = folder / "models" / "llama_numpy"
    model.mkdir(parents=True, exist_ok=True)
    tensors, heads = weights()
    (model / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, model / "model.safetensors")
    save_file(heads, model / "retaining_heads.safetensors")
    for name, case in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        files = run(case, *inputs())
        said = files["query_allkeys" if case["method"] == "apb" else "full"]
        best = np.sort(said["step_logits"], axis=-1)
        card = case | {
            "case": name, "reference": "tests/golden/numpy_reference.py", "model": "models/llama_numpy",
            "steps": STEPS, "doc_len": DOCUMENT, "query_len": QUERY,
            "min_greedy_margin": round(float((best[:, -1] - best[:, -2]).min()), 4),
        }  # fmt: skip
        (folder / name / "case.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        for file, table in files.items():
            np.savez_compressed(folder / name / f"{file}.npz", **table)


if __name__ == "__main__":
    record(RECORDED)
