"""What the sparse methods select, against direct numpy transcriptions of their definitions."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from apb_jax.attention.infllm import InfLLM, local_scores, representatives, retrieve
from apb_jax.attention.locret import State
from apb_jax.attention.minference_index import TILE, block_sparse_tiles, vertical_slash_tiles
from apb_jax.attention.starx import shard_weight
from apb_jax.attention.xattention import block_mass, select_blocks, threshold_table
from apb_jax.measure.minference_search import BLOCK, choose, search_head
from pallas_kernels.block_sparse_attention import KeyTiles

HEADS, KV_HEADS, DIM = 4, 2, 8


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def random_qk(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    return rng.normal(size=(rows, HEADS, DIM)), rng.normal(size=(rows, KV_HEADS, DIM))


def needle(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """One key in the middle that every query points at."""
    q, k = random_qk(rows)
    k[rows // 2] = 4 * q.reshape(rows, KV_HEADS, -1, DIM).mean((0, 2)) + 6
    q += 0.5
    return q, k


def sink(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first four keys draw all queries."""
    q, k = random_qk(rows)
    q += 1
    k[:4] += 3
    return q, k


def slash(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Every query points at the key 150 tokens before it."""
    q, k = random_qk(rows)
    for h in range(HEADS):
        q[150:, h] += 3 * k[:-150, h // (HEADS // KV_HEADS)]
    return q, k


INPUTS = [random_qk, needle, sink, slash]


def on_device(q: np.ndarray, k: np.ndarray, rows: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    """With garbage behind the last real row, which must not matter."""
    return tuple(
        jnp.asarray(np.pad(x, ((0, rows - len(x)), (0, 0), (0, 0)), constant_values=50.0)[None], jnp.float32)
        for x in (q, k)
    )  # type: ignore[return-value]


# ---- XAttention ------------------------------------------------------------------------------------------------------


def xattention_mass(q: np.ndarray, k: np.ndarray, stride: int, block: int, rows: int) -> np.ndarray:
    """Mass [H, I, J] by the definition, q and k zero-padded to ``rows``."""
    count, n = rows // stride, len(q)
    q, k = (np.pad(x, ((0, rows - n), (0, 0), (0, 0))) for x in (q, k))
    out = np.zeros((HEADS, rows // block, rows // block))
    for h in range(HEADS):
        key, z = k[:, h // (HEADS // KV_HEADS)], np.zeros((count, count))
        for row in range(count):
            for column in range(row + 1):
                z[row, column] = sum(
                    q[row * stride + stride - 1 - t, h] @ key[column * stride + t] for t in range(stride)
                )
        for row in range(-(-n // stride)):
            p = softmax(z[row, : row + 1] / (np.sqrt(DIM) * stride))
            for column, value in enumerate(p):
                out[h, row * stride // block, column * stride // block] += value
    return out


def xattention_selected(mass: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    chosen = np.zeros(mass.shape, bool)
    for h, row in np.ndindex(mass.shape[:2]):
        kept = {0, row}
        have, need = sum(mass[h, row, j] for j in kept), threshold[h] * mass[h, row].sum()
        for j in sorted(set(range(mass.shape[2])) - kept, key=lambda j: -mass[h, row, j]):
            if not have < need:
                break
            kept.add(j)
            have += mass[h, row, j]
        chosen[h, row, [j for j in kept if j <= row]] = True
    return chosen


@pytest.mark.parametrize("make", INPUTS)
def test_xattention_selects_by_definition(make: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> None:
    rows, n, stride, block = 256, 243, 4, 16
    q, k = make(n)
    expected = xattention_mass(q, k, stride, block, rows)
    tokens = jnp.asarray([n], jnp.int32)
    mass = block_mass(*on_device(q, k, rows), stride=stride, block=block, q_tokens=tokens, k_tokens=tokens)
    np.testing.assert_allclose(mass[0], expected, atol=1e-4)
    threshold = np.asarray([0.3, 0.6, 0.9, 0.95])
    own = np.arange(rows // block)
    forced = (own[None] == 0) | (own[None] == own[:, None])
    chosen = select_blocks(mass, jnp.asarray(forced), jnp.asarray(own[None] <= own[:, None]), jnp.asarray(threshold))
    wanted = xattention_selected(expected, threshold)
    assert (np.asarray(chosen[0]) == wanted).all()
    assert wanted[0].sum() < wanted[3].sum() <= rows // block * (rows // block + 1) / 2


def test_xattention_needle_block_is_selected() -> None:
    q, k = needle(243)
    tokens = jnp.asarray([243], jnp.int32)
    mass = block_mass(*on_device(q, k, 256), stride=4, block=16, q_tokens=tokens, k_tokens=tokens)
    assert (np.asarray(mass)[0, :, -1].argmax(-1) == 121 // 16).all()


def test_xattention_rows_of_a_later_shard() -> None:
    """The second half of the rows against all keys is the second half of the whole estimate."""
    q, k = on_device(*random_qk(243), 256)
    tokens = jnp.asarray([243], jnp.int32)
    whole = block_mass(q, k, stride=4, block=16, q_tokens=tokens, k_tokens=tokens)
    half = block_mass(q[:, 128:], k, stride=4, block=16, q_tokens=tokens - 128, k_tokens=tokens, offset=128)
    np.testing.assert_allclose(half, whole[:, :, 8:], atol=1e-5)


def test_published_thresholds() -> None:
    """Means as the specification states them."""
    assert threshold_table("llama3.1-8b", 8).shape == (32, 32)
    assert threshold_table("llama3.1-8b", 8).mean() == pytest.approx(0.761, abs=1e-3)
    assert threshold_table("llama3.1-8b", 16).mean() == pytest.approx(0.907, abs=1e-3)


# ---- MInference ------------------------------------------------------------------------------------------------------


def keys_of_tile(tiles: KeyTiles, head: int, tile: int) -> set[int]:
    count, columns = int(tiles.counts[0, head, tile]), int(tiles.column_counts[0, head, tile])
    seen: list[int] = []
    for start in np.asarray(tiles.starts[0, head, tile, :count]):
        seen += range(start, start + TILE)
    seen += np.asarray(tiles.columns[0, head, tile, :columns]).tolist()
    assert len(seen) == len(set(seen)), "a key counted twice"
    return set(seen)


def vertical_slash_keys(q: np.ndarray, k: np.ndarray, v: int, s: int, end: int) -> set[int]:
    """The keys of the query tile [end - 64, end) by the definition, one head."""
    n = len(q)
    v, s, w = min(n, max(v, 30)), min(n, max(s, 50)), min(64, n)
    logits = q[n - w :] @ k.T / np.sqrt(DIM)
    logits[np.arange(n)[None] > np.arange(n - w, n)[:, None]] = -np.inf
    a = softmax(logits)
    vert = a.sum(0)
    vert[:30] = np.inf
    slashes = np.zeros(n)
    for c in range(n):
        for i in range(w):
            j = c - (w - 1) + i
            slashes[c] += a[i, j] if 0 <= j < n else 0
    slashes[max(0, n - 100) :] = np.inf
    columns = np.argsort(-vert, kind="stable")[:v]
    # Equal scores: the smaller distance first.
    distances = [n - 1 - c for c in sorted(range(n), key=lambda c: (-slashes[c], -c))[:s]]
    ranges: list[list[int]] = []
    for distance in sorted((d for d in distances if d < end), reverse=True):
        stop = max(end - distance, 64)
        if not ranges or stop > ranges[-1][1] + 64:
            ranges.append([stop - 64, stop])
        elif stop > ranges[-1][1]:
            ranges[-1][1] += 64
    inside = {j for a, b in ranges for j in range(a, b)}
    return inside | {int(j) for j in columns if j < end}


@pytest.mark.parametrize("make", INPUTS)
def test_minference_vertical_slash_by_definition(make: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> None:
    rows, n = 448, 421
    q, k = make(n)
    sizes = np.asarray([[30, 50], [60, 120], [31, 200], [200, 101]], np.int32)
    tiles = vertical_slash_tiles(
        *on_device(q, k, rows), jnp.asarray([n], jnp.int32), *(jnp.asarray(sizes[:, i]) for i in (0, 1)), 200, 200
    )
    for head in range(HEADS):
        mine = k[:, head // (HEADS // KV_HEADS)]
        for tile in range(-(-n // TILE)):
            end = (tile + 1) * TILE
            expected = vertical_slash_keys(q[:, head], mine, *sizes[head].tolist(), end)
            # Only keys up to the tile's last row can be seen.
            found = keys_of_tile(tiles, head, tile)
            assert {j for j in found if j < end} == {j for j in expected if j < end}, (head, tile)


def test_minference_finds_the_slash_and_the_needle() -> None:
    q, k = slash(421)
    one = jnp.full((HEADS,), 1, jnp.int32)
    tiles = vertical_slash_tiles(*on_device(q, k, 448), jnp.asarray([421], jnp.int32), one, 101 * one, 1, 101)
    for head in range(HEADS):
        assert set(range(384 - 150, 421 - 150)) <= keys_of_tile(tiles, head, 6)
    q, k = needle(421)
    tiles = vertical_slash_tiles(*on_device(q, k, 448), jnp.asarray([421], jnp.int32), 31 * one, one, 31, 1)
    for head in range(HEADS):
        assert 421 // 2 in keys_of_tile(tiles, head, 6)


@pytest.mark.parametrize("n", [448, 421])
def test_minference_block_sparse_by_definition(n: int) -> None:
    q, k = random_qk(n)
    tiles = block_sparse_tiles(*on_device(q, k, 448), jnp.asarray([n], jnp.int32), top_k=3)
    padded = [np.pad(x, ((0, 448 - n), (0, 0), (0, 0))).reshape(7, TILE, -1, DIM).mean(1) for x in (q, k)]
    for head in range(HEADS):
        scores = padded[0][:, head] @ padded[1][:, head // (HEADS // KV_HEADS)].T
        for tile in range(7):
            best = sorted(range(tile + 1), key=lambda j: -scores[tile, j])[: min(3, n // TILE, tile + 1)]
            found = np.asarray(tiles.starts[0, head, tile, : int(tiles.counts[0, head, tile])]) // TILE
            assert found.tolist() == sorted(best)


# ---- StarX -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokens"), [(9, 30), (20, 30), (20, 7), (1, 30)])
def test_starx_weight_by_definition(rows: int, tokens: int) -> None:
    stride, (q, k) = 4, random_qk(32)
    t = min(rows, tokens)
    length = -(-32 // stride) * stride
    raw = np.zeros(HEADS)
    for h in range(HEADS):
        a, b = np.zeros((length, DIM)), np.zeros((length, DIM))
        a[:t], b[:t] = q[:t, h], k[:t, h % KV_HEADS]
        m = np.zeros((stride, stride))
        for c in range(length // stride):
            m += a[c * stride : (c + 1) * stride] @ b[c * stride : (c + 1) * stride].T / np.sqrt(DIM)
        raw[h] = sum(m[i, stride - 1 - i] for i in range(stride))
    found = shard_weight(
        *(jnp.asarray(x[None], jnp.float32) for x in (q, k)),
        jnp.asarray([rows], jnp.int32), jnp.asarray([tokens], jnp.int32), stride,
    )  # fmt: skip
    np.testing.assert_allclose(found[0], raw, atol=1e-4)
    if rows == 1:
        assert not np.asarray(found).any()  # a decoding step weighs all shards alike


# ---- Locret ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilizers", [0, 3])
def test_locret_keeps_the_best_and_the_last(stabilizers: int) -> None:
    """Three chunks of different lengths through a cache of 10 entries, against lists."""
    rng = np.random.default_rng(stabilizers)
    slots, chunk, kv = 10, 8, 2
    like = jnp.zeros((1, chunk, kv, 1)), jnp.zeros((1, chunk, kv))
    state, kept = State.empty(*like, slots), [[] for _ in range(kv)]
    seen = 0
    for number, fresh in enumerate((7, 8, 5)):
        scores = rng.normal(size=(chunk, kv)).astype(np.float32)
        names = np.arange(seen, seen + chunk, dtype=np.float32)  # an entry's key is its index in the document
        k = jnp.asarray(np.broadcast_to(names[None, :, None, None], (1, chunk, kv, 1)))
        last = number == 2
        protected = 0 if last else stabilizers
        arguments = jnp.asarray(scores[None]), jnp.asarray([fresh], jnp.int32), jnp.asarray([protected], jnp.int32)
        state = state.extend(k, k, *arguments)
        for h in range(kv):
            both = kept[h] + [(seen + i, scores[i, h]) for i in range(fresh)]
            rank = [np.inf if i >= len(both) - protected else s for i, (_, s) in enumerate(both)]
            best = sorted(sorted(range(len(both)), key=lambda i: -rank[i])[:slots])
            kept[h] = [both[i] for i in best]
        seen += fresh
        assert int(state.held[0]) == len(kept[0])
        for h in range(kv):
            found = np.asarray(state.k)[0, slots - len(kept[h]) :, h, 0]
            assert found.tolist() == [name for name, _ in kept[h]]


# ---- InfLLM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", INPUTS)
def test_infllm_retrieves_by_definition(make: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> None:
    """Scores in the window, representatives and the blocks of every step, against loops."""
    rows, window, step, first, size, leaders, count = 240, 60, 40, 4, 8, 3, 5
    q, k = make(rows)
    group = HEADS // KV_HEADS
    received = np.zeros((rows, HEADS))
    for h in range(HEADS):
        for t in range(rows):
            low = max(0, t - window + 1)
            received[low : t + 1, h] += softmax(k[low : t + 1, h // group] @ q[t, h] / np.sqrt(DIM))
    queries, keys = on_device(q, k, rows)
    found = local_scores(queries, keys, window, step)
    np.testing.assert_allclose(found[0], received, atol=1e-4)
    blocks = (rows - first) // size
    cut = lambda a: a[:, first : first + blocks * size].reshape(1, blocks, size, *a.shape[2:])  # noqa: E731
    wanted = np.zeros((blocks, HEADS, DIM))
    for b, h in np.ndindex(blocks, HEADS):
        own = slice(first + b * size, first + (b + 1) * size)
        best = np.argsort(-received[own, h])[:leaders]
        wanted[b, h] = k[own, h // group][best].mean(0)
    mine = representatives(cut(keys), cut(found), leaders)
    np.testing.assert_allclose(mine[0], wanted, atol=1e-4)
    method = InfLLM(init_tokens=first, local_tokens=window, block_tokens=size, step_tokens=step)
    for start in range(0, rows, step):
        outside = sum(first + (b + 1) * size <= start - window for b in range(blocks))
        packed = method.packed(jnp.int32(start))
        assert int(packed) == outside
        chosen = retrieve(queries[:, start : start + step], jnp.ones((1, step)), mine, packed, count)
        scores = [float((wanted[b] * q[start : start + step].mean(0)).sum()) for b in range(outside)]
        expected = np.argsort(-np.asarray(scores))[:count]
        assert np.asarray(chosen)[0, : len(expected)].tolist() == expected.tolist()


# ---- MInference's offline search -------------------------------------------------------------------------------------


SMALL = (  # the release's candidates at a tenth of their size, for samples of 300 rows
    ("stream_llm", 10, 80), ("vertical_and_slash", 31, 80), ("vertical_and_slash", 40, 75),
    ("vertical_and_slash", 60, 70), ("vertical_and_slash", 150, 31), ("block_sparse", 4, 0),
)  # fmt: skip


def search_recalls(q: np.ndarray, k: np.ndarray, skip: int) -> list[float]:
    """Every candidate's recall by the definition, one head."""
    n = len(q)
    logits = q @ k.T / np.sqrt(DIM)
    logits[np.triu_indices(n, 1)] = -np.inf
    p = softmax(logits)
    last = p[n - 64 :]
    columns, lines = last.sum(0), np.zeros(n)
    for i, row in enumerate(range(n - 64, n)):
        for d in range(row + 1):
            lines[d] += last[i, row - d]
    columns[:30], lines[:30] = np.inf, np.inf
    recalls = []
    for kind, vertical, width in SMALL:
        kept = np.zeros((n, n), bool)
        for i in range(n):
            for j in range(i + 1):
                if kind == "stream_llm":
                    kept[i, j] = j < vertical or i - j <= width
        if kind == "vertical_and_slash":
            best = [set(np.argsort(-x, kind="stable")[:c].tolist()) for x, c in ((columns, vertical), (lines, width))]
            for i in range(n):
                for j in range(i + 1):
                    kept[i, j] = j in best[0] or i - j in best[1]
        if kind == "block_sparse":
            m = -(-n // BLOCK)
            means = [np.pad(x, ((0, m * BLOCK - n), (0, 0))).reshape(m, BLOCK, DIM).mean(1) for x in (q, k)]
            for i in range(m):
                order = sorted(range(i + 1), key=lambda j: -(means[0][i] @ means[1][j]))[: max(1, m // vertical)]
                for j in order:
                    kept[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = True
        recalls.append(float((p * (kept & np.tri(n, dtype=bool)))[skip:].sum(-1).mean()))
    return recalls


@pytest.mark.parametrize("make", INPUTS)
def test_search_chooses_by_definition(make: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> None:
    n, skip = 300, 200
    q, k = make(n)
    for head in range(2):
        expected = search_recalls(q[:, head], k[:, 0], skip)
        found = np.asarray(
            search_head(jnp.asarray(q[:, head], jnp.float32), jnp.asarray(k[:, 0], jnp.float32), skip, SMALL)
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert 0 < min(expected) < max(expected) < 1 - 1e-6
        assert choose(found, SMALL).row()[:3] == choose(np.asarray(expected), SMALL).row()[:3]


def test_search_prefers_the_earlier_of_equals_and_renames() -> None:
    assert choose(np.asarray([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])).row() == ["vertical_and_slash", 100, 800, 1.0]
    assert choose(np.asarray([0, 0, 0, 0, 0, 0.5])).row() == ["vertical_and_slash", 1000, 6096, 0.5]
    assert choose(np.asarray([0, 0, 0, 0.7, 0.7, 0.5])).row() == ["vertical_and_slash", 500, 700, 0.7]
