"""Hostile Python arguments: every call of the API with values of other kinds, shapes and ranges says so in words.

A ``TypeError`` is for a wrong number or name of arguments alone, as in all of Python; everything else is a UserError of
one line. No call here is legal, so one that answers is a fault too: it would be silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ids, random_model, tiny_config
from hf_checkpoints import write_checkpoint

from apb_jax.attention.apb import APB
from apb_jax.attention.inputs import Kernels, Prompt
from apb_jax.attention.placement import Placement
from apb_jax.attention.registry import METHODS, MethodSpec
from apb_jax.engine import Engine, Settings
from apb_jax.errors import UserError
from apb_jax.files import to_json
from apb_jax.joining import Joining
from apb_jax.measure.auto import Measurement, read_calibration
from apb_jax.measure.receipt import receipt
from apb_jax.mesh import make_mesh
from apb_jax.model.config import LayerSpec, ModelConfig, with_string, with_yarn
from apb_jax.options import RunConfig
from apb_jax.prompt.style import PromptStyle
from apb_jax.retaining.train import Recipe
from apb_jax.rope.default import DefaultRope
from apb_jax.rope.linear import LinearRope
from apb_jax.rope.llama3 import Llama3Rope
from apb_jax.rope.string import StringRope
from apb_jax.rope.yarn import YarnRope
from apb_jax.sampling import Sampler
from apb_jax.weights.checkpoint import load

NAN, INF = math.nan, math.inf
NO_COUNT: tuple[Any, ...] = (0, -1, 2.5, NAN, INF, True, "x", "3", b"x", [], {}, (1,), 1 << 40)
NO_NUMBER: tuple[Any, ...] = (NAN, INF, -INF, "x", b"x", [], {}, True, None)
NO_TEXT: tuple[Any, ...] = (5, 2.5, True, b"x", [], {}, NAN)
NO_ROW: tuple[Any, ...] = (
    None, 5, 2.5, NAN, True, b"ab", bytearray(b"ab"), {}, {1, 2}, "no tokenizer", object(), [], [1.0, 2.0], [NAN],
    [None], ["a"], [b"a"], [True, False], [1, True], [-1], [1 << 40], [1 << 80], np.int64(5), np.array(5),
    np.array([1.5]), np.array([NAN]), np.array([True]), np.array([-3]), np.array([1 << 40]), np.zeros(0, np.int32),
    np.ones((2, 3), int), np.ones((1, 1, 4), int), np.array(["a"]), np.array([1, 2], object),
    np.array([1 + 1j]), np.datetime64("2026-01-01"),
)  # fmt: skip
"""What is no row of token ids."""
NO_FIELD: tuple[Any, ...] = ([], {}, b"x", NAN, 1 << 80, 1 << 4000, 2 + 1j)
"""What is legal in no field of any method, whatever its type."""
NESTED: tuple[Any, ...] = ([[1, 2], [3]], [[1.5]], [[[1]]], [None, [1]], [[1], True], [["a"]])

Call = Callable[[Any], Any]
Case = tuple[str, Call, Sequence[Any]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model(), "full", make_mesh(1))


@pytest.fixture(scope="module")
def session(engine: Engine) -> Any:
    return engine.prefill([engine.prompt(ids(1, 40), ids(2, 5))])


def on_text() -> list[Case]:
    """Requests and engines: no model runs, for every one of these is refused before."""
    model, mesh, row = random_model(), make_mesh(1), [1, 2, 3]
    engine = Engine(model, "full", mesh)
    prompt = engine.prompt(row, row)
    return [
        ("prompt document", lambda v: engine.prompt(v, row), (*NO_ROW, *NESTED)),
        ("prompt query", lambda v: engine.prompt(row, v), (*NO_ROW, *NESTED)),
        ("prompt embedded", lambda v: engine.prompt(row, row, v), [v for v in NO_ROW if v is not None and _some(v)]),
        ("generate document", lambda v: engine.generate(v, row), (*NO_ROW, *NESTED[1:], [[]], [row, []], [[99]])),
        ("generate query", lambda v: engine.generate(row, v), (*NO_ROW, *NESTED[1:], [row, row], [[96]])),
        ("generate tokens", lambda v: engine.generate(row, row, v), (*NO_COUNT, None, 5000)),
        ("generate seed", lambda v: engine.generate(row, row, 1, seed=v), (-1, 2.5, NAN, "x", None, True, 1 << 40)),
        ("generate sampler", lambda v: engine.generate(row, row, 1, sampler=v), (None, 0.5, "greedy", {}, Sampler)),
        ("generate stop_ids", lambda v: engine.generate(row, row, 1, stop_ids=v),
         (5, "ab", b"ab", [1.5], [True], [None], [-1], [[1]], {1}, np.array([1]))),
        ("generate on_tokens", lambda v: engine.generate(row, row, 1, on_tokens=v), (5, "x", [], True)),
        ("generate logits", lambda v: engine.generate(row, row, 1, logits=v), (None, 1, "yes", [])),
        ("prefill", engine.prefill, ([], (), None, 5, "x", [None], [row], ["x"], [prompt, 5], prompt)),
        ("Engine model", lambda v: Engine(v, "full", mesh), (None, 5, "tiny", b"x", model.config, {})),
        ("Engine method", lambda v: Engine(model, v, mesh),
         (None, 5, "", "nope", b"full", ["full"], METHODS["full"], NAN)),
        ("Engine mesh", lambda v: Engine(model, "full", v),
         (5, "x", (1, 1), [], jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)))),
        ("Engine settings", lambda v: Engine(model, "full", mesh, settings=v), (5, "x", {}, Settings)),
        ("Engine beside", lambda v: Engine(model, "full", mesh, beside=v), (5, "x", model)),
        ("Engine changes", lambda v: Engine(model, "full", mesh, **v),
         ({"nope": 1}, {"shards": 0}, {"shards": 2.0}, {"placement": "zig"}, {"virtual_shards": "8"},
          {"kernels": "auto"})),
        ("with_method", engine.with_method, (None, 5, "", "nope", [])),
        ("Settings shards", lambda v: Settings(shards=v), [v for v in NO_COUNT if v != 1 << 40]),
        ("Settings placement", lambda v: Settings(placement=v), (*NO_TEXT, None, "zig", "")),
        ("Settings flags", lambda v: Settings(slice_decode=v), (None, 1, "x", 0.0)),
        ("Settings kernels", lambda v: Settings(kernels=v), (None, "auto", 5)),
        ("Kernels", Kernels, (*NO_TEXT, "", "nope", "auto")),
        ("Prompt", lambda v: Prompt(v, np.ones(2, int), np.ones(2, int)),
         (row, None, 5, np.ones((2, 2), int), np.zeros(0, int))),
        ("PromptStyle template", lambda v: PromptStyle(template=v), NO_TEXT),
        ("PromptStyle system", lambda v: PromptStyle(system=v), (*NO_TEXT, "", " ")),
        ("PromptStyle separator", lambda v: PromptStyle(separator=v), NO_TEXT),
        ("PromptStyle args", lambda v: PromptStyle(template_args=v), (None, 5, "x", [], {"messages": []})),
        ("Placement", lambda v: Placement(1, v), NO_COUNT[:-1]),
        ("make_mesh sp", make_mesh, NO_COUNT),
        ("make_mesh tp", lambda v: make_mesh(1, v), (*NO_COUNT, None)),
    ]  # fmt: skip


def on_sessions(session: Any) -> list[Case]:
    """One document that is prefilled, asked in ways that are refused before anything runs."""
    engine = session.engine
    return [
        ("ask query", session.ask, [v for v in (*NO_ROW, *NESTED) if v is not None]),
        ("ask tokens", lambda v: session.ask([1], v), (*NO_COUNT, None)),
        ("start stop_ids", lambda v: session.start([1], 1, stop_ids=v), (5, "ab", [1.5], [-1])),
        ("logits", session.logits,
         (5, "x", b"x", {}, [], [1], [None], [[1.5]], [[NAN]], [[True]], [[-1]], [[96]], [[1 << 40]], [[1], [2]],
          [["a"]], np.ones((1, 3), int), [np.ones((1, 3), int)], [[1] * 5000])),
        ("save", session.save, (None, 5, NAN, b"x", [], "", "/proc/nope/x", "x.partial", "/dev/null")),
        ("load_session", engine.load_session, (None, 5, b"x", [], "", "nope", "/dev/null", "/dev/zero", "a\0b")),
    ]  # fmt: skip


def on_values() -> list[Case]:
    """Settings, models and files: valid once constructed, or not constructed."""
    hf = {name: value for name, value in tiny_config().to_hf().items() if not name.startswith("rope_")}
    config = tiny_config()
    cases: list[Case] = [
        ("Sampler temperature", Sampler, (*NO_NUMBER, -1, 1e-300, 1e300, 1 << 4000)),
        ("Sampler top_p", lambda v: Sampler(0.5, v), (*NO_NUMBER, 0, -1, 1.5)),
        ("load", load, (None, 5, NAN, b"x", [], {}, "", "nope", "a\0b", "/dev/null", "/dev/zero", "x" * 300)),
        ("load weights", lambda v: load("tiny", weights=v), (5, NAN, b"x", [], "nope", "a\0b", "/dev/zero")),
        ("load heads", lambda v: load("tiny", heads=v), (5, NAN, b"x", [], "nope", "/dev/zero", "a\0b")),
        ("load dtype", lambda v: load("tiny", dtype=v), (5, NAN, b"x", [], "", "fp8", "float64", np.float32)),
        ("load fold", lambda v: load("tiny", fold_heads=v), (5, "x", NAN, [])),
        ("LayerSpec window", lambda v: LayerSpec(window=v), [v for v in NO_COUNT if v != 1 << 40]),
        ("LayerSpec rope", lambda v: LayerSpec(rope=v), (5, "default", {})),
        ("DefaultRope", DefaultRope, (*NO_NUMBER, 0, 1, -5)),
        ("LinearRope", lambda v: LinearRope(1e4, v), (*NO_NUMBER, 0, -1, 0.5)),
        ("YarnRope factor", lambda v: YarnRope(1e4, v, 64), (*NO_NUMBER, 0, 0.5)),
        ("YarnRope original", lambda v: YarnRope(1e4, 4.0, v), NO_COUNT[:-1]),
        ("YarnRope beta", lambda v: YarnRope(1e4, 4.0, 64, v), (*NO_NUMBER, 0, -1)),
        ("Llama3Rope", lambda v: Llama3Rope(1e4, v, 1.0, 4.0, 64), (*NO_NUMBER, 0, 0.5)),
        ("StringRope", lambda v: StringRope(1e4, base=DefaultRope(1e4), offset=v, local=8),
         (-1, 2.5, NAN, "x", None, True)),
        ("with_yarn", lambda v: with_yarn(config, v), (*NO_NUMBER, 0, -1)),
        ("with_string", lambda v: with_string(config, v), (*NO_NUMBER, 0, -1)),
        ("MethodSpec", MethodSpec, (*NO_TEXT, None, "", "nope")),
        ("MethodSpec options", lambda v: MethodSpec("apb", v), (None, 5, "x", [], {"nope": 1}, {"anchor_tokens": "x"})),
        ("APB order", lambda v: APB(8, 8, v), ("x", 2.5, NAN, True, [])),
        ("RunConfig", lambda v: RunConfig(**v),
         ({"needle": "x"}, {"query": "x"}, {"document": "nope", "query": "x"}, {"session": "x"}, {"save_session": "x"},
          {"heads": "nope"}, {"method": "auto", "options": (("a", 1),)}, {"compare": ("apb",)}, {"mass": False})),
        ("Joining", lambda v: Joining(*v), (("x", 2, 0), ("h:1", 2, 2), ("h:1", None, 0), ("h:1", 2.0, 0), (5, 2, 0))),
        ("Measurement", lambda v: Measurement("full", v, 1, 1.0), NO_COUNT[:-1]),
        ("Measurement seconds", lambda v: Measurement("full", 1, 1, v), (*NO_NUMBER, 0, -1)),
        ("to_json", lambda v: to_json({"a": [v]}), (NAN, INF, -INF, [NAN])),
        ("from_hf", lambda v: ModelConfig.from_hf(hf | v),
         ({"num_key_value_heads": 2.5}, {"rms_norm_eps": NAN}, {"rope_parameters": {}}, {"rope_theta": "x"},
          {"vocab_size": None}, {"eos_token_id": [1.5]}, {"hidden_act": "gelu"}, {"new_key": 1},
          {"num_hidden_layers": 0}, {"rope_scaling": {"rope_type": "yarn", "factor": NAN}},
          {"max_position_embeddings": -1})),
    ]  # fmt: skip
    for name in ("vocab_size", "num_layers", "num_kv_heads", "head_dim", "max_positions"):
        cases.append((f"ModelConfig {name}", lambda v, name=name: tiny_config(**{name: v}), (*NO_COUNT, None)))
    for name, values in (
        ("family", (None, 5, "x")), ("rope", (None, 5, "default", {})), ("rms_norm_eps", (*NO_NUMBER, 0, -4, 1e12)),
        ("eos_ids", (5, None, [1], (1.5,), (True,), ("x",))), ("layers", (None, (), (5,), [LayerSpec()])),
        ("bos_id", (1.5, "x", True)), ("qkv_bias", (1, None, "x")),
    ):  # fmt: skip
        cases.append((f"ModelConfig {name}", lambda v, name=name: tiny_config(**{name: v}), values))
    for field in ("learning_rate", "steps"):
        cases.append((f"Recipe {field}", lambda v, field=field: Recipe(**{field: v}), (NAN, INF, -1, "x", None)))
    for name, kind in METHODS.items():  # each field of each method
        needed = {field.name: 8 for field in fields(kind) if field.default is MISSING}
        for field in fields(kind):
            make = partial(made_with, kind, needed, field.name)
            cases.append((f"{name}.{field.name}", make, NO_FIELD))
    return cases


def made_with(kind: type, needed: dict[str, Any], field: str, value: Any) -> Any:
    return kind(**needed | {field: value})


def _some(value: Any) -> bool:
    """Whether it is more than an empty row: an embedded query may be empty."""
    return not isinstance(value, list | np.ndarray) or np.size(value) > 0


def attacked(cases: Sequence[Case]) -> Iterator[tuple[str, Call, Any]]:
    for name, call, values in cases:
        for value in values:
            yield name, call, value


def answered(cases: Sequence[Case]) -> list[str]:
    """What was not refused in words of one line: what happened in place of it."""
    found = []
    for name, call, value in attacked(cases):
        told = f"{name} {value!r:.60}"
        try:
            with np.errstate(all="ignore"):
                result = call(value)
        except UserError as error:
            if not str(error).strip() or "\n" in str(error):
                found.append(f"{told}: {error!r}")
        except Exception as error:  # noqa: BLE001 - what is looked for
            found.append(f"{told}: {type(error).__name__}: {error}")
        else:
            found.append(f"{told}: {result!r:.80}")
    return found


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_requests_and_engines(nowhere: Path) -> None:
    assert answered(on_text()) == []


def test_sessions(session: Any, nowhere: Path) -> None:
    assert answered(on_sessions(session)) == []
    assert list(nowhere.iterdir()) == []


def test_values(nowhere: Path) -> None:
    assert answered(on_values()) == []


def test_there_are_enough_calls(session: Any) -> None:
    cases = [*on_text(), *on_sessions(session), *on_values()]
    assert len(list(attacked(cases))) >= 600
    assert len({name for name, *_ in cases}) >= 60


def test_names_and_numbers_of_arguments_are_python_s_own(engine: Engine) -> None:
    for call in (lambda: engine.generate(), lambda: engine.generate([1], [1], 1, nope=1), lambda: Sampler(1, 2, 3)):
        with pytest.raises(TypeError, match="argument"):
            call()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """One NaN in one tensor, or one infinity in the heads, is found while the weights enter."""
    from safetensors.numpy import load_file, save_file

    folder = write_checkpoint(tmp_path / "model", heads=True, dtype=np.float32)
    load(folder, dtype="float32").place(None)
    for file, bad in (("model.safetensors", np.nan), ("retaining_heads.safetensors", np.inf)):
        path = folder / file
        good = path.read_bytes()
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = bad
        save_file(tensors, path)
        with pytest.raises(UserError, match="holds 1 values that are NaN or infinite"):
            load(folder, dtype="float32").place(None)
        path.write_bytes(good)


def test_a_receipt_over_nan_is_an_error() -> None:
    logits = np.zeros((2, 4), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[1, 2] = bad
        for pair in ((broken, logits), (logits, broken)):
            with pytest.raises(UserError, match="logits hold NaN or infinity"):
                receipt(*pair, [1], [1])


def test_a_folder_named_like_a_preset_is_not_the_preset(tmp_path: Path) -> None:
    """Nor does it get the preset's sizes or template."""
    own = load(write_checkpoint(tmp_path / "tiny"))
    assert own.name == "./tiny"
    assert own.config.hidden_size != load("tiny").config.hidden_size
    engine = Engine(own, "full", make_mesh(sp=1))
    assert engine.template != Engine(load("tiny"), "full", make_mesh(sp=1)).template
    assert load(write_checkpoint(tmp_path / "mine")).name == "mine"


@pytest.mark.parametrize("row", ['"x"', "0", '{"method": "full", "devices": 1, "tokens": 0, "prefill_s": 1}',
                                 '{"method": "full", "devices": 1, "tokens": 9, "prefill_s": 0}',
                                 '{"method": "nope", "devices": 1, "tokens": 9, "prefill_s": 1}',
                                 '{"method": "full", "devices": "8", "tokens": 9, "prefill_s": 1}',
                                 '{"method": "full", "devices": 1, "tokens": 9, "prefill_s": NaN}'])  # fmt: skip
def test_damaged_calibrations(tmp_path: Path, row: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(f'{{"device": "cpu", "rows": [{row}]}}', encoding="utf-8")
    with pytest.raises(UserError, match="is not a calibration"):
        read_calibration(path, "tiny")
