"""``--method auto`` decides from measurements; the method table says what the methods say."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_config

from apb_jax import calibrate
from apb_jax.attention.__main__ import table
from apb_jax.attention.registry import METHODS
from apb_jax.errors import UserError
from apb_jax.measure.auto import Calibration, Measurement, decide, read_calibration, write_calibration


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
