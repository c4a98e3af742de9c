"""Keys and values in 8 bits: codes and scales, attention over them, engines, what travels, sessions, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.attention.wire import pack, unpack
from apb_jax.engine import check_kv
from apb_jax.errors import UserError
from apb_jax.kv_codes import CODES, SMALLEST_SCALE, dequantise, quantise
from apb_jax.measure.memory import Case, hypothetical, memory_of
from apb_jax.measure.traffic import layer_traffic
from apb_jax.precision import Precision
from apb_jax.quantised_cache import QuantisedCache
from pallas_kernels import device
from pallas_kernels.decode_attention import Codes, decode_attention
from pallas_kernels.errors import KernelInputError, Unsupported

STEP = {"fp8": 2.0**-4, "int8": 0.5 / 127}
"""Most that rounding loses: of a value itself (e4m3, 3 bits of mantissa), of its row's largest (int8)."""
LOGITS = {"fp8": 0.06, "int8": 0.015}
"""Relative error of logits of the random model against the same method without codes."""
DOCUMENT, QUERY, ANSWER = ids(1, 251), ids(2, 9), ids(3, 4)
MODEL = random_model()
BASES: dict[int, apb_jax.Engine] = {}


def engine(method: Any, sp: int, kv: str, **settings: Any) -> apb_jax.Engine:
    base = BASES.get(sp) or BASES.setdefault(sp, apb_jax.Engine(MODEL, "ring", apb_jax.make_mesh(sp=sp)))
    return base.with_method(method, precision=Precision(kv=kv), **settings)


def session(current: apb_jax.Engine) -> Any:
    return current.prefill([current.prompt(DOCUMENT, QUERY)])


@pytest.mark.parametrize("kind", CODES)
def test_codes_of_hostile_rows(kind: str) -> None:
    """Rows of zeros, of subnormals, with outliers of 1e4, of one value, and the largest bfloat16."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 64)).astype(np.float32)
    rows[0] = 0
    rows[1] *= 1e-39
    rows[2, ::9] = 1e4
    rows[3] = -3.0
    rows[4] *= 3e37
    codes, scale = quantise(jnp.asarray(rows), CODES[kind])
    assert codes.dtype == CODES[kind].dtype
    assert (np.asarray(scale) >= SMALLEST_SCALE).all()
    assert np.isfinite(np.asarray(codes, np.float32)).all()
    back = np.asarray(dequantise(codes, scale, jnp.float32))
    largest = np.abs(rows).max(axis=1, keepdims=True)
    # Below 2^-6 of the scale e4m3 is subnormal: its steps are 2^-9 of the scale. XLA flushes float32 subnormals.
    allowed = STEP[kind] * (np.abs(rows) + largest / 448 / 2 if kind == "fp8" else largest) * 1.001 + SMALLEST_SCALE
    assert (np.abs(back - rows) <= allowed).all()
    np.testing.assert_array_equal(back[0], 0)


def cached(kind: str, keys: int = 90) -> tuple[Any, ...]:
    """Stacks of two layers: k, v, their scales."""
    rng = np.random.default_rng(4)
    parts = [quantise(jnp.asarray(rng.standard_normal((2, 2, keys, 2, 16)), jnp.float32), CODES[kind]) for _ in "kv"]
    return parts[0][0], parts[1][0], parts[0][1], parts[1][1]


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("rows", [1, 37])
def test_attention_over_codes_is_that_over_their_values(kind: str, rows: int) -> None:
    """XLA, a step and a query of more than one part of rows; NaN behind the lengths changes nothing."""
    k, v, k_scale, v_scale = cached(kind)
    q = jnp.asarray(np.random.default_rng(5).standard_normal((2, rows, 4, 16)), jnp.float32)
    lengths, layer = jnp.asarray([90, 33]), jnp.int32(1)
    offset = jnp.asarray([53, 5]) if rows > 1 else None
    exact = [dequantise(a, s, jnp.float32) for a, s in ((k, k_scale), (v, v_scale))]
    want = decode_attention(q, *exact, lengths, offset, layer=layer, implementation="reference")
    behind = jnp.arange(90)[None, None, :, None] >= lengths[None, :, None, None]
    spoiled = [jnp.where(behind, jnp.nan, s) for s in (k_scale, v_scale)]
    if kind == "fp8":
        k, v = (jnp.where(behind[..., None], jnp.asarray(jnp.nan, a.dtype), a) for a in (k, v))
    for name, scales in (("xla", spoiled), ("reference", (k_scale, v_scale))):
        given = (k, v) if name == "xla" else cached(kind)[:2]
        codes = [Codes(a, s) for a, s in zip(given, scales, strict=True)]
        got = decode_attention(q, *codes, lengths, offset, layer=layer, implementation=name)
        for found, wanted in zip(got, want, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)


def test_calls_that_do_not_fit_are_refused() -> None:
    k, v, k_scale, v_scale = (a[0] for a in cached("fp8"))
    q, lengths = jnp.zeros((2, 1, 4, 16)), jnp.asarray([90, 33])
    with pytest.raises(KernelInputError, match="k has float8_e4m3fn and v_scale is missing"):
        decode_attention(q, Codes(k, k_scale), v, lengths)
    with pytest.raises(KernelInputError, match="k has float32 and k_scale is given"):
        decode_attention(q, *(Codes(a.astype(jnp.float32), k_scale) for a in (k, v)), lengths)
    with pytest.raises(KernelInputError, match=r"v_scale is float32\[2, 89, 2\]; it must be float32\[2, 90, 2\]"):
        decode_attention(q, Codes(k, k_scale), Codes(v, v_scale[:, 1:]), lengths)
    codes, q16 = (Codes(k, k_scale), Codes(v, v_scale)), q.astype(jnp.bfloat16)
    with device.assume(device.HOPPER), pytest.raises(Unsupported, match="mosaic_gpu reads caches of 16 bits"):
        decode_attention(q16, *codes, lengths, implementation="mosaic_gpu")
    with device.assume(device.Device("gpu", "A100", (8, 0))), pytest.raises(Unsupported, match="Ada"):
        decode_attention(q16, *codes, lengths, implementation="triton")
    with (
        device.assume(device.HOPPER),
        pytest.raises(Unsupported, match="triton reads caches of 8 bits"),
    ):
        decode_attention(*(a.astype(jnp.bfloat16) for a in (q, k, v)), lengths, implementation="triton")


def test_a_gpu_without_the_type_is_refused() -> None:
    with device.assume(device.Device("gpu", "A100", (8, 0))):
        with pytest.raises(UserError, match=r"fp8 needs compute capability 8\.9 or newer, A100 has 8\.0; .*int8"):
            check_kv("fp8")
        check_kv("int8")
    with device.assume(device.Device("gpu", "T4", (7, 5))), pytest.raises(UserError, match="choice: --kv-dtype model"):
        check_kv("int8")


@pytest.mark.parametrize("kind", CODES)
def test_what_travels_is_what_the_codes_stand_for(kind: str) -> None:
    k, v = (jnp.asarray(np.random.default_rng(n).standard_normal((1, 5, 2, 16)), jnp.float32) for n in (7, 8))
    packed = pack(k, v, kind)
    assert packed.nbytes == 5 * 2 * (2 * 16 + 8)
    for got, sent in zip(unpack(packed, kind, jnp.float32), (k, v), strict=True):
        np.testing.assert_array_equal(got, dequantise(*quantise(sent, CODES[kind]), jnp.float32))


@pytest.fixture(scope="module")
def plain() -> Any:
    """Logits of full attention without codes."""
    return session(engine("full", 1, "model")).logits([ANSWER])[0]


@pytest.fixture(scope="module")
def full_fp8() -> Any:
    return session(engine("full", 1, "fp8"))


def test_shards_agree_and_codes_lose_little(plain: np.ndarray, full_fp8: Any) -> None:
    one = full_fp8.logits([ANSWER])[0]
    four = session(engine("ring", 4, "fp8")).logits([ANSWER])[0]
    assert isinstance(full_fp8.cache, QuantisedCache)
    # Keys that differ in the last bit may round to another code: far below what the codes lose.
    assert np.linalg.norm(four - one) <= 0.1 * np.linalg.norm(one - plain)
    assert 0 < np.linalg.norm(one - plain) <= LOGITS["fp8"] * np.linalg.norm(plain)
    integers = session(engine("full", 1, "int8")).logits([ANSWER])[0]
    assert 0 < np.linalg.norm(integers - plain) <= LOGITS["int8"] * np.linalg.norm(plain)


def test_shards_of_one_device_are_those_of_several() -> None:
    """APB with an exchange in 8 bits, whose passing block every shard sees rounded."""
    method = apb_jax.APB(16, 8, shared_anchor=True)
    logits = [session(engine(method, sp, "fp8", shards=4)).logits([ANSWER])[0] for sp in (4, 2)]
    without = session(engine(method, 4, "model")).logits([ANSWER])[0]
    lost = np.linalg.norm(logits[0] - without)
    assert np.linalg.norm(logits[1] - logits[0]) <= 0.1 * lost
    assert 0 < lost <= LOGITS["fp8"] * np.linalg.norm(without)


@pytest.mark.parametrize("shared", [True, False])
def test_the_exchange_moves_codes_and_scales(shared: bool) -> None:
    """Read off the prefill program: 2 D + 8 bytes a token and head where the model's dtype has 2 D values."""
    method = apb_jax.APB(16, 8, shared_anchor=shared)
    prompt = engine("full", 4, "model").prompt(DOCUMENT, QUERY)
    wide, narrow = (layer_traffic(engine(method, 4, kv), method, [prompt]) for kv in ("model", "fp8"))
    assert narrow.collectives == wide.collectives
    rest = 0
    if shared:  # the scorer's edge of the anchor travels as it did
        rest = wide.received_bytes - 3 * (4 + 8) * 2 * 2 * 16 * 4
    assert (narrow.received_bytes - rest) / (wide.received_bytes - rest) == (2 * 16 + 8) / (2 * 16 * 4)


def test_a_session_keeps_its_codes(tmp_path: Path, full_fp8: Any) -> None:
    folder = tmp_path / "s"
    full_fp8.save(folder)
    loaded = engine("full", 1, "fp8").load_session(folder)
    kept = full_fp8.layout.kept_tokens[0, 0]
    for ours, theirs in zip(jax.tree.leaves(full_fp8.cache), jax.tree.leaves(loaded.cache), strict=True):
        a, b = (np.asarray(x)[:, :, :kept].view(np.uint8) for x in (ours, theirs))
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(loaded.logits([ANSWER])[0], full_fp8.logits([ANSWER])[0])
    size = sum(path.stat().st_size for path in folder.glob("kv-*"))
    assert size <= 1.1 * 2 * 2 * 251 * 2 * (16 + 4)
    with pytest.raises(UserError, match="was saved with kv_dtype 'fp8', here it is 'model'"):
        engine("full", 1, "model").load_session(folder)
    with pytest.raises(UserError, match="was saved with kv_dtype 'fp8', here it is 'int8'"):
        engine("full", 1, "int8").load_session(folder)


def test_the_plan_counts_codes_and_scales(full_fp8: Any) -> None:
    case = Case.of(full_fp8.engine)
    method, layout = case.chosen([hypothetical(251)])
    cache = full_fp8.cache
    assert memory_of(case, method, layout).components["document_kv"] == sum(a.nbytes for a in jax.tree.leaves(cache))


def test_a_word_that_is_no_type_is_refused() -> None:
    with pytest.raises(UserError, match="the precision of kv is 'fp4'; it can be model, fp8, int8"):
        Precision(kv="fp4")
