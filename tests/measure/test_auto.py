"""``--method auto`` decides from measurements; the method table says what the methods say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config

from apb_jax import calibrate
from apb_jax.attention.__main__ import table
from apb_jax.attention.registry import METHODS
from apb_jax.errors import UserError
from apb_jax.measure.auto import (
    Calibration,
    Measurement,
    calibration_path,
    decide,
    read_calibration,
    write_calibration,
)
from apb_jax.measure.choose import choose
from apb_jax.measure.memory import PROGRAM_BYTES
from apb_jax.precision import Precision


def measured(**seconds: list[float]) -> Calibration:
    """Times at 1K, 4K and 16K tokens; full on one device, the rest on four."""
    return Calibration(
        "a device",
        tuple(
            Measurement(name, 1 if name == "full" else 4, 1024 * 4**i, s)
            for name, times in seconds.items()
            for i, s in enumerate(times)
        ),
    )


TIMES = measured(full=[0.01, 0.05, 0.6], ring=[0.03, 0.04, 0.2], ulysses=[0.03, 0.05, 0.15], apb=[0.03, 0.04, 0.08])


def test_short_prompts_stay_on_one_device() -> None:
    decision = decide(1024, 4, tiny_config(), TIMES)
    assert (decision.method, decision.devices) == ("full", 1)
    assert "1024 tokens on 1 of 4 devices" in decision.reason


def test_long_prompts_take_apb_where_it_gains_enough() -> None:
    decision = decide(16384, 4, tiny_config(), TIMES)
    assert (decision.method, decision.devices) == ("apb", 4)
    assert "1.9 times faster than the fastest exact method (ulysses on 4 devices, 0.15 s)" in decision.reason


def test_exact_on_request_and_where_approximation_gains_little() -> None:
    assert decide(16384, 4, tiny_config(), TIMES, approximate=False).method == "ulysses"
    near = measured(full=[0.01, 0.05, 0.6], ring=[0.03, 0.04, 0.09], apb=[0.03, 0.04, 0.08])
    decision = decide(16384, 4, tiny_config(), near)
    assert decision.method == "ring"
    assert "1.12 times as fast, less than the 1.25" in decision.reason


def test_only_what_the_devices_and_the_model_allow() -> None:
    assert decide(16384, 2, tiny_config(), TIMES).method == "full"
    with pytest.raises(UserError, match=r"no exact method was measured on 2 or fewer devices.*calibrate --sp 2"):
        decide(16384, 2, tiny_config(), measured(ring=[1, 1, 1]))


def test_prediction_is_a_power_law_between_measurements() -> None:
    quadratic = measured(full=[0.01, 0.16, 2.56])
    assert quadratic.predict("full", 1, 2048) == pytest.approx(0.04)
    assert quadratic.predict("full", 1, 65536) == pytest.approx(40.96)
    assert quadratic.predict("full", 1, 512) == pytest.approx(0.0025)
    assert quadratic.predict("ring", 4, 512) is None


def test_calibration_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    with pytest.raises(UserError, match=r"run once: python -m apb_jax\.calibrate --model tiny"):
        read_calibration(path, "tiny")
    write_calibration(path, TIMES.device, TIMES.rows)
    assert read_calibration(path, "tiny") == TIMES
    zero = {"method": "full", "devices": 1, "tokens": 1024, "prefill_s": 0}
    path.write_text(json.dumps({"device": "a device", "rows": [zero]}))
    with pytest.raises(UserError, match=r"table\.json is not a calibration \(.*took 0 s; it must be above 0\); delete"):
        read_calibration(path, "tiny")
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a calibration"):
        read_calibration(path, "tiny")


def test_calibrate_measures_every_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers import random_model

    import apb_jax.weights.checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    monkeypatch.setattr(apb_jax.weights.checkpoint, "load", lambda *_, **__: random_model())
    calibrate.main(["--model", "tiny", "--sp", "2", "--lengths", "256", "--repeat", "1"])
    assert "4 measurements written to" in capsys.readouterr().out
    (path,) = tmp_path.glob("apb_jax/calibration/*.json")
    rows = read_calibration(path, "tiny").rows
    assert {(r.method, r.devices) for r in rows} == {("full", 1), ("ring", 2), ("ulysses", 2), ("apb", 2)}
    assert all(r.prefill_s > 0 for r in rows)


def test_table_has_every_method() -> None:
    text = table()
    for name, kind in METHODS.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` "))
        assert ("| exact |" in line) == kind.can.exact
        assert kind.can.paper in line


# ---- with the plan ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out() -> None:
    """The reason names what was left out, and how long a document may be."""
    room = {("full", 1): 8192, ("ring", 4): 65536, ("ulysses", 4): 8192, ("apb", 4): 8192}
    decision = decide(16384, 4, tiny_config(), TIMES, longest=lambda *key: room[key])
    assert (decision.method, decision.devices) == ("ring", 4)
    assert "left out, 16384 tokens do not fit: full on 1 device (at most 8,192), ulysses on 4" in decision.reason
    assert decision.reason.endswith("the longest document that fits so has 65,536 tokens")


def test_an_approximate_method_alone_may_fit() -> None:
    fits = lambda method, _: 65536 if method == "apb" else 8192  # noqa: E731
    decision = decide(16384, 4, tiny_config(), TIMES, longest=fits)
    assert decision.method == "apb"
    assert "no exact method that was measured holds them" in decision.reason
    with pytest.raises(UserError, match=r"16384 tokens fit under no method.*full on 1 device \(at most 8,192\)"):
        decide(16384, 4, tiny_config(), TIMES, approximate=False, longest=fits)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (("fulll", 1, 1024, 1.0), "method 'fulll'; there are: full"),
        (("full", 0, 1024, 1.0), "devices 0; it must be at least 1"),
        (("full", 1, True, 1.0), "tokens is True; it must be a whole number"),
        (("full", 1, 1024, 0.0), "took 0.0 s; it must be above 0"),
        (("full", 1, 1024, float("nan")), "took nan s"),
        (("full", 1, 1024, "fast"), "prefill_s is 'fast'; it must be a number"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused(row: tuple, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        Measurement(*row)


def test_a_length_measured_twice_is_refused() -> None:
    row = Measurement("full", 1, 1024, 1.0)
    with pytest.raises(UserError, match="full on 1 devices at 1024 tokens twice"):
        Calibration("a device", (row, row))


def test_choose_knows_the_devices_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that one device's full attention breaks and four devices' ring does not."""
    from helpers import random_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = random_model(max_positions=65536)
    fast_full = measured(full=[0.01, 0.02, 0.04], ring=[0.03, 0.04, 0.2], apb=[0.03, 0.04, 0.19])
    write_calibration(calibration_path(model.config, model.dtype.name), "a device", fast_full.rows)
    assert choose(model, 16384, 4).method == "full"
    decision = choose(model, 16384, 4, limit=PROGRAM_BYTES + 14 * 2**20)
    assert (decision.method, decision.devices) == ("ring", 4)
    assert "full on 1 device (at most" in decision.reason
    deeper = random_model(max_positions=65536, num_layers=4)
    write_calibration(calibration_path(deeper.config, deeper.dtype.name), "a device", fast_full.rows)
    told: dict[str, Any]
    for told, method in (({}, "ring"), ({"kv_memory": "host"}, "full"), ({"precision": Precision(kv="int8")}, "full")):
        assert choose(deeper, 16384, 4, limit=PROGRAM_BYTES + 28 * 2**20, **told).method == method


def test_evals_take_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is the method chosen, and says so."""
    from apb_jax.weights.checkpoint import load
    from evals.base import SystemSpec
    from evals.system import connect

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("APB_JAX_CACHE", "off")
    model = load("tiny", dtype="float32")
    rows = measured(full=[0.5, 1.0, 2.0], ring=[0.03, 0.04, 0.2]).rows
    write_calibration(calibration_path(model.config, "float32"), "a device", rows)
    spec = SystemSpec("tiny", ("auto",), {}, None, None, "float32", 4, 1, length=1024)
    facts = connect(spec)("auto").describe()
    assert (facts["method"], facts["chosen"], facts["mesh"]["sp"]) == ("auto", "ring", 4)
    assert "1024 tokens on 4 of 4 devices: ring on 4 devices about 0.03 s" in facts["reason"]
    with pytest.raises(UserError, match="method auto decides itself"):
        connect(SystemSpec("tiny", ("auto",), {"auto": {"order": "plain"}}, None, None, "float32", 4, 1))
