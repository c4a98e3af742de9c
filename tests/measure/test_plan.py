"""The plan: bytes by component, the longest document, seconds, refusals before a weight is read."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ids, random_model
from hf_checkpoints import write_checkpoint

from apb_jax.attention.registry import MethodSpec
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.measure import host_link
from apb_jax.measure.auto import Calibration, Measurement
from apb_jax.measure.devices import figures_named, figures_of, known_devices
from apb_jax.measure.memory import Case, activation_moments, memory_for, weight_bytes
from apb_jax.measure.plan import (
    KV_HOST,
    STAYING,
    check_memory,
    fits,
    gib,
    longest_document,
    plan,
    plan_length,
    planned_bytes,
    spread,
)
from apb_jax.mesh import USABLE, make_mesh
from apb_jax.plan import main
from apb_jax.presets import MODELS
from apb_jax.run import main as run_main
from apb_jax.weights.checkpoint import LoadedModel

GIB = 2**30
H100 = figures_named("h100")


def case(model: str = "llama3.1-8b", method: str = "full", devices: int = 1, **changes: Any) -> Case:
    """A preset in bf16, without retaining heads unless asked for."""
    spec = MethodSpec(method)
    shards = spec.shards_on(devices, changes.pop("shards", None))
    return Case(MODELS[model].config, model, 2, spec, devices, shards=shards, **changes)


def test_known_figures_of_llama() -> None:
    """16.06 GB of weights; 131,072 bytes a token, which makes 16 GiB at 128K."""
    assert weight_bytes(case()) == 2 * 8_030_261_248
    components = memory_for(case(), 131072 - 96).components
    assert components["document_kv"] == 131072 * 131072
    assert components["exchange"] == 0
    assert components["tail_kv"] == (64 + 32) * 131072


def test_retaining_heads_count_and_tp_divides() -> None:
    """fc1 [6144, 1024] and fc2 [1024, 8] in 32 layers; norms and the embedding stay whole under tp."""
    plain, heads = weight_bytes(case()), weight_bytes(case(retaining_hidden=1024))
    assert heads - plain == 2 * 32 * (6144 * 1024 + 1024 * 8)
    replicated = 2 * (128256 * 4096 + 65 * 4096)
    assert weight_bytes(case(tp=4)) == (plain - replicated) // 4 + replicated
    assert (
        memory_for(case(tp=4), 32000).components["document_kv"] * 4
        == (memory_for(case(), 32000).components["document_kv"])
    )


def test_weights_are_what_the_model_allocates() -> None:
    """The table's count against the shapes of the module itself, with folded and plain heads."""
    for fold in (False, True):
        model = dataclasses.replace(random_model(), fold_heads=fold)
        allocated = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in model.shapes().values())
        assert weight_bytes(Case.of(Engine(model, "full", make_mesh(1)))) == allocated


@pytest.mark.parametrize(("method", "devices"), [("full", 1), ("apb", 1), ("ring", 4), ("apb", 4), ("full", 4)])
def test_components_add_up_and_grow_with_the_document(method: str, devices: int) -> None:
    plans = [plan_length(case("llama3-8b-1m", method, devices), 1 << n, 76 * GIB) for n in range(13, 19)]
    for found in plans:
        assert found.memory.bytes_per_device == sum(found.memory.components.values())
        assert found.to_json()["bytes_per_device"] == sum(found.to_json()["components"].values())
    totals = [found.memory.bytes_per_device for found in plans]
    assert totals == sorted(totals)
    assert len(set(totals)) == len(totals)


def test_the_largest_moment_of_a_layer_counts() -> None:
    """Short documents: the MLP's chunk is largest; long ones: the projections, since chunks stop growing."""
    sums = lambda rows: {  # noqa: E731
        name: sum(terms.values()) for name, terms in activation_moments(case(), rows, scored=False).items()
    }
    short, long = sums(4096), sums(131072)
    assert max(short, key=short.__getitem__) == "mlp"
    assert max(long, key=long.__getitem__) == "rotation"
    assert long["rotation"] == 131072 * 2 * (4096 + 1024 + 6144)


def test_gathering_costs_more_than_a_ring() -> None:
    exchange = {
        name: memory_for(case(method=name, devices=4), 100_000).components["exchange"] for name in ("full", "ring")
    }
    assert exchange["full"] > 2 * exchange["ring"] > 0


@pytest.mark.parametrize(("method", "devices"), [("full", 1), ("apb", 1), ("apb", 2)])
def test_longest_is_the_boundary(method: str, devices: int) -> None:
    one, limit = case("llama3-8b-1m", method, devices), 60 * GIB
    longest = longest_document(one, limit)
    assert fits(one, longest, limit, 64, 32)
    assert not fits(one, longest + 1, limit, 64, 32)
    assert longest_document(one, None) == 1048576 - 96
    assert longest_document(one, 10 * GIB) == 0


@pytest.mark.parametrize(
    ("method", "devices", "tokens", "measured_s"),
    [
        ("full", 1, 131039, 10.05),
        ("apb", 1, 131039, 5.70),
        ("ring", 2, 131039, 5.17),
        ("ulysses", 2, 131039, 5.25),
        ("star", 2, 131039, 10.3),
        ("apb", 2, 131039, 3.83),
    ],
)
def test_flops_bound_what_was_measured(method: str, devices: int, tokens: int, measured_s: float) -> None:
    """Prefill seconds on H100 (JAX 0.11.2): the bound lies below each of them, by at most a fifth."""
    found = plan_length(case("llama3-8b-1m", method, devices), tokens, None, figures=H100)
    assert found.expected is not None
    assert "FLOPs" in found.expected.basis
    assert 0.8 * measured_s < found.expected.seconds < measured_s


def test_zigzag_evens_the_load() -> None:
    seconds = {}
    for order in ("contiguous", "zigzag"):
        expected = plan_length(
            case(method="apb", devices=4, shards=8, order=order), 130_000, None, figures=H100
        ).expected
        assert expected is not None
        seconds[order] = expected.seconds
    assert seconds["zigzag"] < seconds["contiguous"]


def test_a_calibration_comes_first() -> None:
    measured = Calibration("a device", (Measurement("full", 1, 1000, 1.0), Measurement("full", 1, 2000, 2.0)))
    found = plan_length(case(), 4000, None, figures=H100, calibration=measured).expected
    assert found is not None
    assert (found.seconds, found.basis) == (pytest.approx(4.0), "python -m apb_jax.calibrate on a device")
    other = plan_length(case(method="ring", devices=2), 4000, None, figures=H100, calibration=measured).expected
    assert other is not None
    assert "FLOPs" in other.basis


def test_remedies_are_tried() -> None:
    """Every remedy named would fit by the same arithmetic."""
    found = plan_length(case("llama3-8b-1m"), 600_000, 70 * GIB)
    assert not found.fits
    assert found.remedies[0] == "--sp 4 (4 devices)"
    assert found.remedies[-1] == f"a document of at most {found.longest:,} tokens"
    assert plan_length(case("llama3-8b-1m", devices=4), 600_000, 70 * GIB).fits
    assert not plan_length(case("llama3-8b-1m", devices=2), 600_000, 70 * GIB).fits


def test_kv_in_host_memory() -> None:
    """Two of 32 layers count on a device, all of them in the host; what does not fit is told of it."""
    device = case("llama3-8b-1m", "apb", devices=2)
    here, there = (memory_for(one, 2**20 - 96) for one in (device, dataclasses.replace(device, kv_memory="host")))
    assert here.host_bytes == 0
    assert there.host_bytes == 2**20 * 131072  # of the whole document, on two devices
    assert there.components["document_kv"] * 16 == here.components["document_kv"]
    assert {k: v for k, v in here.components.items() if k != "document_kv"} == {
        k: v for k, v in there.components.items() if k != "document_kv"
    }
    assert KV_HOST in plan_length(device, 2**20 - 96, 76 * GIB).remedies
    assert plan_length(dataclasses.replace(device, kv_memory="host"), 2**20 - 96, 76 * GIB).fits


def test_host_memory_is_checked_and_its_cost_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(random_model(), "apb", make_mesh(4))
    prompt = engine.prompt(ids(0, 400), ids(1, 20))
    assert host_link.host_note(engine, [prompt]) is None
    engine = engine.with_method("apb", kv_memory="host")
    monkeypatch.setattr(host_link, "bandwidth", lambda mesh: 1e6)
    needed = memory_for(Case.of(engine), 400).host_bytes
    note = host_link.host_note(engine, [prompt])
    assert note is not None
    assert f"about {needed / 1e6:.2g} s each at 0 GB/s" in note
    monkeypatch.setattr(host_link, "free_host_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"--kv host: the documents' KV takes .* nearest legal choice: --kv-dtype int8"):
        host_link.host_note(engine, [prompt])


def test_layers_stay_on_the_devices_as_far_as_they_fit() -> None:
    """None without a limit; each one more takes one layer's KV from the host, which has none in the end."""
    engine = Engine(random_model(num_layers=4), "apb", make_mesh(4), kv_memory="host")
    prompt = engine.prompt(ids(0, 400), ids(1, 20))
    assert spread(engine, [prompt], 8) is engine
    bare = memory_for(Case.of(engine), 400, 20, 8)
    layer = bare.host_bytes // 4 // 4
    found = {}
    for extra in (-1, 0, 1, 2, 2.5, 3, 4, 99):
        limit = int((bare.bytes_per_device + extra * layer) / STAYING) + 1
        one = spread(engine, [prompt], 8, limit)
        found[extra] = one.settings.kv_layers
        planned = memory_for(Case.of(one), 400, 20, 8)
        assert planned.bytes_per_device <= limit or extra < 0
        assert planned.host_bytes == bare.host_bytes // 4 * (4 - found[extra])
    assert found == {-1: 0, 0: 0, 1: 1, 2: 2, 2.5: 2, 3: 3, 4: 4, 99: 4}
    note = host_link.host_note(one, [prompt])
    assert note == "--kv host: all 4 layers of the document's KV fit on the devices and stay there"
    device = engine.with_method("apb", kv_memory="device")
    assert spread(device, [prompt], 8, 1 << 40) is device


def test_the_host_link_is_measured() -> None:
    assert 0 < host_link.bandwidth(make_mesh(2)) < math.inf


def test_odd_head_counts_leave_out_tp() -> None:
    """9 query and 3 KV heads: no power of two divides them."""
    found = plan_length(case("smollm2-135m"), 8000, 700 * 2**20)
    assert found.remedies
    assert not any(remedy.startswith("--tp") for remedy in found.remedies)


def test_devices_have_sources() -> None:
    for row in known_devices().values():
        assert figures_of(row.device_kind) == row
        assert "jax" in row.source
    assert figures_of("cpu") is None
    with pytest.raises(UserError, match="device 'b200' has no measured figures; there are: h100, h200"):
        figures_named("b200")


# ---- before weights are read -----------------------------------------------------------------------------------------


def test_engine_is_checked_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(random_model(), "apb", make_mesh(4))
    prompt = engine.prompt(ids(0, 400), ids(1, 20))
    needed = plan(Case.of(engine), [prompt], None, 8).memory.bytes_per_device
    monkeypatch.setattr(LoadedModel, "place", lambda *_: pytest.fail("weights were read"))
    check_memory(engine, [prompt], 8, needed)
    check_memory(engine, [prompt], 8)  # a CPU sets no limit
    with pytest.raises(UserError, match=rf"400 document tokens under apb need {gib(needed)} on each of 4 devices"):
        check_memory(engine, [prompt], 8, needed - 1)


def test_a_run_reports_planned_beside_measured() -> None:
    from apb_jax.report import describe, figures

    engine = Engine(random_model(), "full", make_mesh(1))
    session = engine.prefill([engine.prompt(ids(0, 200), ids(1, 20))])
    (answer,) = session.generate(4, stop_ids=())
    result = describe(session, answer, None)
    assert result["planned_bytes_per_device"] == planned_bytes(session, 4) > 0
    assert "memory per device, planned" in dict(figures(result | {"memory_source": "measured peak"}))
    assert "memory per device, planned" not in dict(figures(result | {"memory_source": "compiler's estimate"}))


def test_run_refuses_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command without a limit would have opened them."""
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    folder = write_checkpoint(tmp_path / "model", heads=True)

    def opened(*_: Any) -> None:
        raise UserError("weights were read")

    monkeypatch.setattr(LoadedModel, "place", opened)
    command = ["--model", str(folder), "--seq", "200", "--max-new-tokens", "4", "--sp", "2"]
    assert run_main([*command, "--gpu-memory", "64m"]) == 2
    errors = capsys.readouterr().err
    assert "need 256 MiB on each of 2 devices (programs 256 MiB" in errors
    assert errors.count("\n") == 1
    assert run_main(command) == 2
    assert "weights were read" in capsys.readouterr().err


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is the JSON object; exit status says whether it fits."""
    arguments = ["--model", "llama3-8b-1m", "--gpus", "2", "--gpu-memory", "80g", "--gpu", "h100", "--json"]
    assert main([*arguments, "--seq", "128k"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result) >= {"fits", "bytes_per_device", "longest_document_tokens", "components", "seconds"}
    assert result["fits"] is True
    assert result["limit_bytes"] == int(USABLE * 80 * GIB)
    assert main([*arguments, "--seq", "1m"]) == 1
    taken = capsys.readouterr()
    result = json.loads(taken.out.splitlines()[-1])
    assert result["fits"] is False
    assert result["would_fit"]
    assert 131072 < result["longest_document_tokens"] < 1048576
    assert "does not fit: 1,048,480 document tokens under apb need" in taken.err
    assert main([*arguments, "--seq", "1m", "--kv", "host"]) == 0
    taken = capsys.readouterr()
    result = json.loads(taken.out.splitlines()[-1])
    assert result["kv_layers_that_stay"] == 17
    assert result["host_bytes"] == 15 * 2**32
    assert "memory of the host: 60.0 GiB of document KV, 15 of 32 layers, read once a token" in taken.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--seq", "1m"], "--seq 1048576 exceeds the 131072 positions of llama3.1-8b; nearest legal choice: 131072"),
        (["--seq", "90"], "--seq 90 leaves no room for a document"),
        (["--gpus", "8", "--tp", "3"], "--tp 3 does not divide --gpus 8; nearest legal choice: --gpus 9"),
        (["--gpus", "48", "--tp", "16"], "--tp 16 does not divide llama3.1-8b's 8 KV heads"),
        (
            ["--gpu-memory", "lots"],
            "--gpu-memory is 'lots', which is not a size in bytes; write for example 512m or 80g",
        ),
        (["--gpu", "b200"], "device 'b200' has no measured figures"),
        (["--method", "rings"], "did you mean 'ring'?"),
        (["--gpus", "2", "--shards", "3"], "--shards 3 is no multiple of the 2 devices"),
        (["--methd", "ring"], "did you mean --method?"),
    ],
)
def test_odd_input_gets_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "llama3.1-8b", *([] if "--seq" in arguments else ["--seq", "8k"]), *arguments]
    assert main(given) == 2
    errors = capsys.readouterr().err
    assert line in errors
    assert errors.count("\n") == 1
