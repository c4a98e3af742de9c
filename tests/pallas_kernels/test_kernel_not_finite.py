"""A NaN in a key or value that a row sees makes its output NaN; it never passes for a row that sees nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from apb_jax.attention.remapped import Border, Interval, remapped_attention
from pallas_kernels.block_sparse_attention import Blocks, KeyTiles, block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.flash_attention import RowSegment, flash_attention

HEADS, DIM, KEYS = 4, 16, 64


def qkv(rows, bad, where):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, HEADS, DIM)).astype(np.float32) for n in (rows, KEYS, KEYS))
    (k if where == "key" else v)[0, 3] = bad
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def flash(implementation):
    return lambda q, k, v: flash_attention(
        q, (k,), (v,), (RowSegment(q.shape[1], start=0, offset=KEYS, end=KEYS),), implementation=implementation
    )


def decode(implementation):
    return lambda q, k, v: decode_attention(q, k, v, jnp.asarray([KEYS], jnp.int32), implementation=implementation)


def sparse(implementation):
    def call(q, k, v):
        tiles = KeyTiles(
            jnp.broadcast_to(jnp.arange(0, KEYS, 16, dtype=jnp.int32), (1, HEADS, q.shape[1] // 16, KEYS // 16)),
            jnp.full((1, HEADS, q.shape[1] // 16), KEYS // 16, jnp.int32),
        )
        blocks = Blocks(16, 16)
        return block_sparse_attention(
            q, k, v, tiles, blocks=blocks, causal_offset=KEYS, implementation=implementation
        )  # fmt: skip

    return call


def remapped(q, k, v):
    rows = jnp.zeros((1, q.shape[1]), jnp.int32)
    place = jnp.zeros(k.shape[:3], jnp.int32)
    return remapped_attention(q, q, k, v, rows, place, Interval(rows, rows + KEYS), Border(offset=1))


CALLS = {
    "flash reference": flash("reference"),
    "flash xla_chunked": flash("xla_chunked"),
    "decode reference": decode("reference"),
    "decode xla": decode("xla"),
    "sparse reference": sparse("reference"),
    "sparse xla": sparse("xla"),
    "remapped": remapped,
}


@pytest.mark.kernel
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("rows", [16, 32])  # decoding has a path for few rows
@pytest.mark.parametrize("name", CALLS)
def test_nan_is_seen(name, rows, where):
    out, _ = CALLS[name](*qkv(rows, np.nan, where))
    assert np.isnan(np.asarray(out)).all()
    clean, _ = CALLS[name](*qkv(rows, 0.5, where))
    assert np.isfinite(np.asarray(clean)).all()
