"""Which implementation serves a call, and what is said when none does."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import KernelInputError, Unsupported, tuned
from pallas_kernels import device as device_module
from pallas_kernels.decode_attention import mosaic_gpu as decode_mosaic
from pallas_kernels.device import HOPPER, Device, assume, current, refuse_unless_hopper
from pallas_kernels.dispatch import Implementation, accepts_all, choose, record_choices
from pallas_kernels.flash_attention import IMPLEMENTATIONS, RowSegment, flash_attention
from pallas_kernels.flash_attention import mosaic_gpu as flash_mosaic
from pallas_kernels.flash_attention.call import make_call

AMPERE = Device("gpu", "NVIDIA A100", (8, 0))
TURING = Device("gpu", "NVIDIA T4", (7, 5))


def attention_call(offset=0, dtype=jnp.bfloat16, dim=64):
    q, kv = jnp.zeros((1, 8, 4, dim), dtype), jnp.zeros((1, 8, 2, dim), dtype)
    return make_call(q, (kv,), (kv,), (RowSegment(8, 0, offset, 8),), None)


@pytest.mark.parametrize(
    ("device", "change", "name"),
    [
        (HOPPER, {}, "mosaic_gpu"),
        (HOPPER, {"dim": 32}, "cudnn"),
        (HOPPER, {"dtype": jnp.float32}, "xla_chunked"),
        (AMPERE, {}, "cudnn"),
        (AMPERE, {"offset": jnp.int32(0)}, "triton"),
        (TURING, {}, "xla_chunked"),
        (Device("cpu", "cpu"), {}, "xla_chunked"),
    ],
)
def test_the_first_implementation_that_accepts_is_chosen(device, change, name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)  # jax-triton is on machines with a GPU
    with assume(device):
        assert choose("flash_attention", IMPLEMENTATIONS, None, attention_call(**change)).name == name


def test_triton_kernels_say_which_package_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == "jax_triton" else package)
    with (
        assume(AMPERE),
        pytest.raises(Unsupported, match=r"triton needs the package jax-triton, .* \(`pip install jax-triton`\)"),
    ):
        choose("flash_attention", IMPLEMENTATIONS, "triton", attention_call())


@pytest.mark.parametrize(("version", "reason"), [(12080, "12.8"), (12090, "12.9"), (12060, None), (13000, None)])
def test_hopper_kernels_are_refused_where_ptxas_miscompiles_them(version, reason, monkeypatch):
    monkeypatch.setattr(device_module, "cuda_runtime_version", lambda: version)
    refusal = refuse_unless_hopper(HOPPER)
    assert refusal == (
        reason
        and f"is refused under CUDA {reason}: ptxas 12.8.0 to 12.9.0 miscompiles masks; `pip install jax[cuda13]`"
    )


def test_choices_are_recorded_where_they_are_traced():
    call = attention_call(dtype=jnp.float32)

    @jax.jit
    def run(q, k, v):
        return flash_attention(q, (k,), (v,), call.rows, implementation="reference")

    with record_choices() as outer, record_choices() as seen:
        run(call.q, call.k[0], call.v[0])
        flash_attention(call.q, call.k, call.v, call.rows)
    assert seen == outer == {"flash_attention": {"reference", "xla_chunked"}}
    with record_choices() as later:
        run(call.q, call.k[0], call.v[0])
    assert later == {}


def test_all_refusals_arrive_together():
    def refuse(call, device):
        return f"wants another call than {call}, not on {device.name}"

    implementations = [Implementation(name, print, refuse) for name in ("one", "two")]
    with pytest.raises(ExceptionGroup) as caught:
        choose("op", implementations, None, 7)
    here = current().name
    assert [str(e) for e in caught.value.exceptions] == [
        f"op: {name} wants another call than 7, not on {here}" for name in ("one", "two")
    ]
    assert all(isinstance(e, Unsupported) for e in caught.value.exceptions)


def test_a_name_is_taken_at_its_word():
    manual = Implementation("manual", print, accepts_all, automatic=False)
    refusing = Implementation("refusing", print, lambda call, device: "never runs")
    assert choose("op", [refusing, manual], "manual", None) is manual
    with pytest.raises(Unsupported, match="op: refusing never runs"):
        choose("op", [refusing, manual], "refusing", None)
    with pytest.raises(KernelInputError, match="no implementation 'third'; it has refusing, manual"):
        choose("op", [refusing, manual], "third", None)


def test_tuned_parameters_are_fields_of_the_configurations():
    files = sorted(tuned.FOLDER.glob("*.json"))
    for file in files:
        entry = json.loads(file.read_text())
        assert {"device", "date", "jax", "command", "parameters"} <= entry.keys()
        for op, config in (("flash_attention", flash_mosaic.Config), ("decode_attention", decode_mosaic.Config)):
            for parameters in entry["parameters"][op].values():
                assert dataclasses.asdict(config(**parameters)).items() >= parameters.items()
    assert tuned.parameters("flash_attention", 128, Device("gpu", "an unknown one", (9, 0))) == {}
