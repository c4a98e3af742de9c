"""Which implementation serves a call, and what is said when none does."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import KernelInputError, Unsupported, tuned
from pallas_kernels.decode_attention import mosaic_gpu as decode_mosaic
from pallas_kernels.device import HOPPER, Device, assume, current
from pallas_kernels.dispatch import Implementation, accepts_all, choose
from pallas_kernels.flash_attention import IMPLEMENTATIONS, RowSegment
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
def test_the_first_implementation_that_accepts_is_chosen(device, change, name):
    with assume(device):
        assert choose("flash_attention", IMPLEMENTATIONS, None, attention_call(**change)).name == name


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
