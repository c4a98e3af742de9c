"""A fingerprint of weights by content: whichever file they came from and however they are split over devices.

Every element's bits and its index are mixed and summed modulo 2**32 in four independent lanes. Integer sums do not
depend on the order of adding, so each device sums what it holds and no weight leaves the devices.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

LANES = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
"""Odd constants, one a lane: they make the lanes independent."""
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3 (Appleby, public domain): a bijection of 32 bits in which every bit counts."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def lanes(x: Array) -> UInt32[Array, "4"]:
    """Four sums over all elements of ``x`` (1, 2 or 4 bytes each)."""
    bits = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    sums = []
    for lane in LANES:
        key = jnp.uint32(lane)
        for axis in range(bits.ndim):  # mixed axis by axis: an index over all of them may not fit 32 bits
            key = mixed(key ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(lane))
        sums.append(jnp.sum(mixed(bits ^ key), dtype=jnp.uint32))
    return jnp.stack(sums)


def fingerprint(arrays: dict[str, Any]) -> str:
    """32 hexadecimal digits of arrays by name: their names, shapes, dtypes and contents.

    One pass over the memory of the devices; every changed element changes all four lanes.
    """
    found = {name: lanes(x) for name, x in sorted(arrays.items())}  # all under way before the first is waited for
    rows = [[name, list(x.shape), x.dtype.name, found[name].tolist()] for name, x in sorted(arrays.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def text_fingerprint(value: Any) -> str:
    """32 hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=8)
def tokenizer_fingerprint(tokenizer: Any) -> str:
    """32 hexadecimal digits of what a tokenizer does with text: its vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return text_fingerprint(backend.to_str())
    return text_fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_tokens])
