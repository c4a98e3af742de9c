"""Cases that every flash_attention implementation is held to, and the yardstick for their errors."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention import KeyTiles
from pallas_kernels.flash_attention import RowSegment


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``segments`` are (rows, start, offset, end), an entry may be a list over the batch."""

    name: str
    segments: tuple
    ranges: tuple[int, ...]
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64

    @property
    def rows(self) -> int:
        return sum(segment[0] for segment in self.segments)

    def row_segments(self, dynamic: bool) -> tuple[RowSegment, ...]:
        """The segments with their bounds as ints or, ``dynamic``, as device scalars."""

        def bound(value):
            return jnp.asarray(value, jnp.int32) if dynamic or isinstance(value, list) else value

        return tuple(RowSegment(rows, *map(bound, bounds)) for rows, *bounds in self.segments)

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """First key and end per row, int [B, S], in plain numpy."""
        first, stop = [], []
        for rows, *bounds in self.segments:
            start, offset, end = (np.broadcast_to(np.asarray(b), (self.batch,))[:, None] for b in bounds)
            index = np.arange(rows)[None]
            first.append(np.broadcast_to(start, (self.batch, rows)))
            stop.append(np.minimum(end, offset + index + 1))
        return np.concatenate(first, 1), np.concatenate(stop, 1)

    def visible(self) -> np.ndarray:
        """bool [B, S, T]"""
        first, stop = self.intervals()
        key = np.arange(sum(self.ranges))
        return (first[..., None] <= key) & (key < stop[..., None])


def apb_case(shard: int, *, shards=8, anchor=32, passing=16, block=48, **sizes) -> Case:
    """The APB prefill of one shard: keys [passing | anchor | block], rows [anchor | block]."""
    total = (shards - 1) * passing
    first_block_key = total + anchor
    used = shard * passing
    dead = shard == 0
    return Case(
        f"apb shard {shard} of {shards}",
        (
            (anchor, total, total, total if dead else first_block_key),
            (block, first_block_key if dead else total - used, first_block_key, first_block_key + block),
        ),
        (total, anchor, block),
        **sizes,
    )


CASES = (
    Case("causal", ((96, 0, 0, 96),), (96,)),
    Case("causal, odd length", ((77, 0, 0, 77),), (77,)),
    Case("causal, multi-head", ((64, 0, 0, 64),), (64,), heads=4, kv_heads=4),
    Case("causal, multi-query", ((64, 0, 0, 64),), (64,), heads=4, kv_heads=1),
    Case("causal, D 128", ((80, 0, 0, 80),), (80,), dim=128),
    Case("causal, odd length, D 128", ((131, 0, 0, 131),), (131,), heads=2, kv_heads=1, dim=128),
    Case("single row, last key", ((1, 0, 70, 71),), (71,)),
    Case("single row, one key", ((1, 5, 5, 6),), (9,)),
    Case("bottom-right causal", ((40, 0, 60, 100),), (100,)),
    Case("rows before the first key", ((50, 0, -13, 50),), (50,)),
    Case("full", ((48, 0, 1000, 90),), (33, 57)),
    Case("range of no keys", ((48, 0, 0, 48),), (0, 48)),
    Case("nothing visible", ((16, 20, 20, 20),), (32,)),
    Case("lengths", ((48, 0, 1000, [90, 1, 0]),), (90,), batch=3),
    Case("starts", ((48, [0, 33, 60], 1000, [60, 60, 60]),), (60,), batch=3),
    Case("three segments", ((20, 0, 0, 90), (7, 40, 100, 60), (33, 30, 57, 90)), (30, 27, 33)),
    *(apb_case(shard) for shard in range(8)),
    apb_case(3, shards=4, anchor=17, passing=9, block=31, batch=2, dim=128),
    apb_case(0, shards=1, anchor=24, passing=8, block=40),
)
LONG_CASES = (
    Case("causal, several tiles", ((700, 0, 0, 700),), (700,), heads=2, kv_heads=1),
    apb_case(5, anchor=130, passing=70, block=390, heads=2, kv_heads=1),
    apb_case(0, anchor=256, passing=128, block=512, heads=4, kv_heads=1, dim=128),
    apb_case(3, anchor=256, passing=128, block=512, heads=4, kv_heads=1, dim=128),
)


def make_inputs(case: Case, dtype, seed: int = 0):
    """q, k ranges, v ranges; every K and V slot that no row sees holds NaN, and so do rows that see nothing."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((case.batch, case.rows, case.heads, case.dim), np.float32)
    shape = (case.batch, sum(case.ranges), case.kv_heads, case.dim)
    k, v = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    visible = case.visible()
    unread = ~visible.any(axis=1)
    k[unread] = np.nan
    v[unread] = np.nan
    q[~visible.any(axis=2)] = np.nan
    edges = np.cumsum(case.ranges)[:-1]

    def cast(array):
        return jnp.asarray(array.astype(jnp.dtype(dtype)))

    ks, vs = (tuple(map(cast, np.split(array, edges, axis=1))) for array in (k, v))
    return cast(q), ks, vs


def exact(case: Case, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """float64 attention of the given (rounded) inputs: out [B, S, H, D], lse [B, H, S]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, *map(_join, (k, v))))
    visible = case.visible()
    read = visible.any(axis=1)[..., None, None]
    k, v = (np.repeat(np.where(read, a, 0), case.heads // case.kv_heads, axis=2) for a in (k, v))
    q = np.where(visible.any(axis=2)[..., None, None], q, 0)
    scores = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(case.dim)
    scores = np.where(visible[:, None], scores, -np.inf)
    seen = visible.any(axis=2)[:, None]
    peak = np.where(seen, scores.max(axis=-1), 0)
    weights = np.exp(scores - peak[..., None])
    total = np.where(seen, weights.sum(axis=-1), 1)
    out = np.einsum("bhst,bthd->bshd", weights / total[..., None], v)
    return out, np.where(seen, peak + np.log(total), -np.inf)


def plain(case: Case, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """What anybody would write: products rounded to the inputs' dtype, softmax in float32, probabilities rounded."""
    dtype = q.dtype
    q, k, v = (np.asarray(a, np.float32) for a in (q, *map(_join, (k, v))))
    visible = case.visible()
    read = visible.any(axis=1)[..., None, None]
    k, v = (np.repeat(np.where(read, a, 0), case.heads // case.kv_heads, axis=2) for a in (k, v))
    q = np.where(visible.any(axis=2)[..., None, None], q, 0)

    def rounded(array):
        return array.astype(dtype).astype(np.float32)

    scores = rounded(np.einsum("bshd,bthd->bhst", q, k, dtype=np.float32)) / np.float32(np.sqrt(case.dim))
    scores = np.where(visible[:, None], scores, np.float32(-np.inf))
    seen = visible.any(axis=2)[:, None]
    peak = np.where(seen, scores.max(axis=-1), 0)
    weights = np.exp(scores - peak[..., None])
    total = np.where(seen, weights.sum(axis=-1), 1)
    out = rounded(np.einsum("bhst,bthd->bshd", rounded(weights / total[..., None]), v, dtype=np.float32))
    return out, np.where(seen, peak + np.log(total), -np.inf)


def _join(ranges):
    return np.concatenate([np.asarray(a) for a in ranges], axis=1)


LARGEST = float(np.finfo(np.float32).max)


def error(got, want) -> float:
    """Relative Frobenius error of ordinary entries; NaN never passes.

    Infinities and the least float32, which marks rows that may not be selected, must agree exactly: counted with the
    others they would hide every error.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    infinite, marked = np.abs(want) > LARGEST / 2, np.abs(got) > LARGEST / 2
    assert (marked == infinite).all(), "infinite entries differ"
    assert (got[infinite] == want[infinite]).all(), "infinite entries differ"
    assert not np.isnan(got).any(), "NaN in the result"
    got, want = np.where(infinite, 0, got), np.where(infinite, 0, want)
    return (
        float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
        if want.any()
        else float(np.abs(got).max(initial=0))
    )


def check(case: Case, dtype, attend, seed: int = 0) -> tuple[float, float]:
    """Hold ``attend(q, k, v, case)`` to at most twice the plain form's error; returns its two errors."""
    q, k, v = make_inputs(case, dtype, seed)
    out, lse = attend(q, k, v, case)
    assert out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    want_out, want_lse = exact(case, q, k, v)
    plain_out, plain_lse = plain(case, q, k, v)
    errors = error(out.astype(jnp.float32), want_out), error(lse, want_lse)
    # The floor is the rounding of the result itself, where the plain form is exact by luck (one key).
    floor = float(jnp.finfo(dtype).eps)
    assert errors[0] <= 2 * max(error(plain_out, want_out), floor), (errors, error(plain_out, want_out))
    assert errors[1] <= 2 * max(error(plain_lse, want_lse), 1e-6), (errors, error(plain_lse, want_lse))
    return errors


def random_tiles(rng, heads, rows, keys, block_q, block_k, aligned, columns):
    """Disjoint windows per head and query tile, and single columns outside them."""
    tiles = -(-rows // block_q)
    places = keys // block_k
    starts = np.zeros((1, heads, tiles, places), np.int32)
    counts = rng.integers(0, places + 1, (1, heads, tiles)).astype(np.int32)
    column = np.zeros((1, heads, tiles, 6), np.int32)
    column_counts = np.zeros((1, heads, tiles), np.int32)
    for h, t in np.ndindex(heads, tiles):
        shift = 0 if aligned else int(rng.integers(0, 3))
        starts[0, h, t] = rng.permutation(places) * block_k + shift
        used = starts[0, h, t, : counts[0, h, t], None] + np.arange(block_k)
        free = rng.permutation(np.setdiff1d(np.arange(keys), used))[:6] if columns else np.zeros(0, int)
        column_counts[0, h, t] = len(free)
        column[0, h, t, : len(free)] = free
    arrays = (starts, counts, column, column_counts) if columns else (starts, counts)
    return KeyTiles(*map(jnp.asarray, arrays))
