"""A saved session answers as before, on any number of shards; whatever is wrong with it is refused in one line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, ids, random_model

import apb_jax
from apb_jax.attention.registry import MethodSpec
from apb_jax.errors import UserError
from apb_jax.model.config import with_string
from apb_jax.session_store import kept, prune, read_manifest, remove
from apb_jax.session_store import reader as reader_module
from apb_jax.session_store import writer as writer_module
from apb_jax.session_store.rows import rows_in_order
from apb_jax.sessions import main
from apb_jax.weights.checkpoint import LoadedModel

DOCUMENT, QUESTIONS = ids(1, 251), [ids(seed, 3 + seed % 7) for seed in range(2, 22)]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "ring": {},
    "apb": {"anchor_tokens": 16, "passing_tokens": 8, "embed_query": False},
    "star": {},
    "locret": {"budget_tokens": 96, "chunk_tokens": 64, "stabilizers": 16, "local_tokens": 8},
}
SHARDS_BEFORE = {"locret": 1}
"""Shards at saving, where they are not 8."""
MODEL = random_model()


BASES: dict[Any, apb_jax.Engine] = {}
"""An engine for every mesh, whose weights and programs the others share: most time goes into compiling."""


def engine(method: str | MethodSpec, sp: int = 1, model: LoadedModel = MODEL, **settings: Any) -> apb_jax.Engine:
    spec = MethodSpec(method, METHODS.get(method, {})) if isinstance(method, str) else method
    if model is not MODEL:
        return apb_jax.Engine(model, spec, apb_jax.make_mesh(sp=sp), **settings)
    base = BASES.get(sp) or BASES.setdefault(sp, apb_jax.Engine(model, "ring", apb_jax.make_mesh(sp=sp)))
    return base.with_method(spec, **settings)


def answers(session: Any, questions: list[list[int]]) -> list[list[int]]:
    return [session.ask(question, 4, stop_ids=()).tokens for question in questions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring session on two shards."""
    folder = tmp_path_factory.mktemp("saved") / "s"
    made = engine("ring", 2)
    made.prefill([made.prompt(DOCUMENT, QUESTIONS[0])]).save(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_the_same_on_any_number_of_shards(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty questions on 8 shards, then on 1, 2, 4 devices and on 8 shards of one device."""
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 1)  # a file a layer
    first = engine(method, SHARDS_BEFORE.get(method, 8))
    session = first.prefill([first.prompt(DOCUMENT, QUESTIONS[0])])
    assert session.method.name == method
    expected = answers(session, QUESTIONS)
    assert len({tuple(one) for one in expected}) > 10
    session.save(tmp_path / "s")
    for sp, shards in ((1, None), (2, None), (4, None), (1, 8)):
        settings = {} if shards is None else {"shards": shards}
        other = engine(method, sp, answers_only=True, **settings)
        loaded = other.load_session(tmp_path / "s", [np.asarray(DOCUMENT)])
        assert loaded.method == session.method
        assert answers(loaded, QUESTIONS) == expected
        assert loaded.notes[-1].startswith(f"loaded from {tmp_path / 's'}")


def test_the_same_shards_give_the_same_cache(saved: Path) -> None:
    made = engine("ring", 2)
    before = made.prefill([made.prompt(DOCUMENT, QUESTIONS[0])])
    after = made.load_session(saved)
    order = rows_in_order(before.layout, made.placement)[0][0]
    for a, b in ((before.cache.k, after.cache.k), (before.cache.v, after.cache.v)):
        np.testing.assert_array_equal(np.asarray(a)[:, :, order], np.asarray(b)[:, :, order])


def test_a_session_saved_again_is_the_same_files(saved: Path, tmp_path: Path) -> None:
    """From four shards, where it was laid out anew: document order does not remember shards."""
    engine("ring", 4).load_session(saved).save(tmp_path / "again")
    assert read_manifest(tmp_path / "again").files == read_manifest(saved).files


def test_a_batch_of_unequal_documents(tmp_path: Path) -> None:
    first = engine("apb", 4)
    documents = [DOCUMENT, ids(31, 127), ids(32, 194)]
    session = first.prefill([first.prompt(document, QUESTIONS[0]) for document in documents])
    expected = [one.tokens for one in session.ask(QUESTIONS[:3], 4, stop_ids=())]
    session.save(tmp_path / "s")
    for sp in (1, 2):
        loaded = engine("apb", sp, answers_only=True).load_session(tmp_path / "s")
        assert [one.tokens for one in loaded.ask(QUESTIONS[:3], 4, stop_ids=())] == expected


def test_positions_travel_under_string(tmp_path: Path) -> None:
    from dataclasses import replace

    model = replace(MODEL, config=with_string(MODEL.config, offset=64, local=8))
    first = engine("ring", 4, model)
    session = first.prefill([first.prompt(DOCUMENT, QUESTIONS[0])])
    expected = answers(session, QUESTIONS[:6])
    session.save(tmp_path / "s")
    for sp in (1, 2):
        assert answers(engine("ring", sp, model).load_session(tmp_path / "s"), QUESTIONS[:6]) == expected
    with pytest.raises(UserError, match=r"was saved with rope 'StringRope.*here it is 'DefaultRope"):
        engine("ring", 2).load_session(tmp_path / "s")
    other = replace(MODEL, config=with_string(MODEL.config, offset=65, local=8))
    with pytest.raises(UserError, match=r"offset=64.*offset=65"):
        engine("ring", 2, other).load_session(tmp_path / "s")


def test_a_method_with_its_own_decoding_needs_its_shards(tmp_path: Path) -> None:
    spec = MethodSpec("starx", {})
    first = engine(spec, 4)
    session = first.prefill([first.prompt(DOCUMENT, QUESTIONS[0])])
    assert session.method.name == "starx"
    expected = answers(session, QUESTIONS[:4])
    session.save(tmp_path / "s")
    assert answers(engine(spec, 4).load_session(tmp_path / "s"), QUESTIONS[:4]) == expected
    with pytest.raises(UserError, match=r"saved on 4 shards, here are 2, and method 'starx' decodes by its own rule"):
        engine(spec, 2).load_session(tmp_path / "s")


def test_what_another_engine_made_is_refused_with_both_values(saved: Path, tmp_path: Path) -> None:
    for other, line in (
        (engine("ring", 2, random_model(seed=1)), r"weights '[0-9a-f]{32}', here it is '[0-9a-f]{32}'"),
        (engine("ring", 2, random_model(num_layers=3)), r"with num_layers 2, here it is 3"),
        (engine("star", 2), r"with method 'ring', here it is 'star'; nearest legal choice: --method ring"),
        (engine(MethodSpec("ring", {"order": "plain"}), 2), r"ring's order 'zigzag', here it is 'plain'"),
        (engine("ring", 2, bottom_right_query=True), r"bottom_right_query False, here it is True"),
    ):
        with pytest.raises(UserError, match=line):
            other.load_session(saved)
    changed = np.asarray(DOCUMENT)
    changed[7] += 1
    with pytest.raises(UserError, match=rf"has token {DOCUMENT[7]} at index 7, the one given {DOCUMENT[7] + 1}"):
        engine("ring", 2).load_session(saved, [changed])
    with pytest.raises(UserError, match="is no saved session"):
        engine("ring", 2).load_session(tmp_path)


def test_an_engine_for_answers_does_not_prefill() -> None:
    only = engine("locret", 2, answers_only=True)
    with pytest.raises(UserError, match="answers_only"):
        only.prefill([only.prompt(DOCUMENT, QUESTIONS[0])])


@pytest.mark.parametrize("which", range(3))
def test_damage_is_found(saved: Path, tmp_path: Path, which: int) -> None:
    """One bit, the last byte, or a file gone: in every file of the session."""
    other = engine("ring", 2)
    names = sorted(path.name for path in saved.iterdir())
    assert len(names) == 3
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        for one in names:
            (folder / one).write_bytes((saved / one).read_bytes())
        data = bytearray((folder / name).read_bytes())
        if which == 0:
            data[len(data) // 2] ^= 1
        elif which == 1:
            del data[-1 if name != "manifest.json" else -9 :]
        (folder / name).write_bytes(data)
        if which == 2:
            (folder / name).unlink()
        with pytest.raises(UserError, match=r"is damaged|is no saved session|format|checksum"):
            other.load_session(folder)
    assert answers(other.load_session(saved), QUESTIONS[:1])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine("ring", 2)
    session = made.prefill([made.prompt(DOCUMENT, QUESTIONS[0])])
    written = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith("kv-"):
            raise OSError(28, os.strerror(28))
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device; nothing was kept"):
        session.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    session.save(tmp_path / "s")
    with pytest.raises(UserError, match="exists; choose another folder"):
        session.save(tmp_path / "s")


SAVE_FOREVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import conftest
import test_session_store as t
made = t.engine("ring", 2)
session = made.prefill([made.prompt(t.DOCUMENT, t.QUESTIONS[0])])
t.writer_module.GROUP_BYTES = 1
for count in range(100000):
    print(count, flush=True)
    session.save(t.Path(sys.argv[1]) / str(count))
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Every folder that a killed process leaves either answers right or says in one line that it is none.

    APB_KILLS: how often; each kill comes at a random moment of the savings.
    """
    other, rng, seen = engine("ring", 1), random.Random(5), 0
    expected = None
    script = SAVE_FOREVER.format(tests=str(ROOT / "tests"), root=str(ROOT))
    for kill in range(int(os.environ.get("APB_KILLS", "5"))):
        root = tmp_path / str(kill)
        root.mkdir()
        process = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(rng.randrange(2, 5)):
            process.stdout.readline()
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for folder in root.iterdir():
            if folder.name.endswith(".partial"):
                with pytest.raises(UserError, match="is unfinished"):
                    other.load_session(folder)
                continue
            found = answers(other.load_session(folder), QUESTIONS[:1])
            expected = expected or found
            assert found == expected
            seen += 1
        prune(root, 0)
        assert list(root.iterdir()) == []
    assert seen  # whole sessions were among them


def test_commands(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = engine("ring", 1).load_session(saved)
    for name in ("a", "b", "c"):
        loaded.save(tmp_path / name)
    for age, name in enumerate(("b", "c", "a")):
        os.utime(tmp_path / name / "manifest.json", (1e9 + age, 1e9 + age))
    (tmp_path / "c" / "prompts.safetensors").unlink()
    assert main(["list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split("\t")[0]).name for line in lines] == ["b", "c", "a"]
    assert "251 tokens" in lines[0]
    assert "does not load" in lines[1]
    assert main(["show", str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["method"]["name"] == "ring"
    size = kept(tmp_path)[-1].bytes
    engine("ring", 1).load_session(tmp_path / "b")  # used now: not the next to go
    assert main(["prune", str(tmp_path), "--keep-bytes", str(size)]) == 0
    assert [one.folder.name for one in kept(tmp_path)] == ["b"]
    assert main(["remove", str(tmp_path / "b")]) == 0
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    for line in (
        ["show", str(tmp_path / "b")],
        ["remove", str(tmp_path)],
        ["list", str(tmp_path / "x")],
        ["prune", str(tmp_path), "--keep-bytes", "much"],
        ["prune", str(tmp_path)],
        ["nothing"],
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_removal_is_at_once(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a removal that was cut off leaves does not load."""
    engine("ring", 1).load_session(saved).save(tmp_path / "s")
    monkeypatch.setattr("apb_jax.session_store.folders.shutil.rmtree", lambda *a, **k: None)
    remove(tmp_path / "s")
    (left,) = tmp_path.iterdir()
    with pytest.raises(UserError, match="is unfinished"):
        engine("ring", 1).load_session(left)
    monkeypatch.undo()
    prune(tmp_path, 10**9)
    assert list(tmp_path.iterdir()) == []


def test_a_session_removed_while_it_is_loaded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine("ring", 1).load_session(saved).save(tmp_path / "s")
    checked = reader_module.check_engine

    def then_gone(*args: Any) -> None:
        checked(*args)
        remove(tmp_path / "s")

    monkeypatch.setattr(reader_module, "check_engine", then_gone)
    with pytest.raises(UserError, match="was removed while it was being loaded"):
        engine("ring", 1).load_session(tmp_path / "s")
