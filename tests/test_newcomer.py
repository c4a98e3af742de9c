"""What somebody meets in the first hour: hints, refusals, the layout picture, defaults and the words about them."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import fake_system
import jax
import numpy as np
import pytest
from helpers import ROOT, ids, random_model, tiny_config
from rich.console import Console

import apb_jax
from apb_jax import install, options
from apb_jax.attention.apb import APB
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.method import Setup
from apb_jax.attention.registry import MethodSpec, resolve
from apb_jax.errors import UserError
from apb_jax.files import near_file
from apb_jax.mesh import DEFAULT_SIMULATED
from apb_jax.options import DEFAULT_SEQ, RunConfig
from apb_jax.run import main, name_notes, run
from apb_jax.screen import PLAIN, WIDTH, layout_picture
from apb_jax.task import NEW_TOKENS, NEW_TOKENS_ABOUT_TEXT
from evals.base import SystemSpec
from evals.system import connect

FRAME = "╭│╰"
"""What a layout picture is drawn with."""
NEGATIVE = r"(?<![\w-])-\d"


class Reached(Exception):
    """The first method was about to run."""


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends where it would begin to compute."""

    def stop(engine: apb_jax.Engine, *_: object) -> None:
        raise Reached(engine)

    monkeypatch.setenv("APB_JAX_CACHE", "off")
    monkeypatch.setattr("apb_jax.measure.compare.run_one", stop)


def book(folder: Path, words: int) -> str:
    path = folder / f"{words}.txt"
    path.write_text("It was a dark and stormy night. " * (words // 7), encoding="utf-8")
    return str(path)


def errors(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """(the one line of an error, everything else on both streams)."""
    taken = capsys.readouterr()
    (line,) = [line for line in taken.err.splitlines() if line.startswith("error: ")]
    return line, taken.out + taken.err.replace(line, "")


# -- hints before a run -----------------------------------------------------------------------------------------------


def test_tiny_says_that_it_only_retrieves(tmp_path: Path) -> None:
    """Prose is where the packaged model disappoints: its answer is invented, and nothing else would say so."""
    document = book(tmp_path, 70)
    (note,) = name_notes(RunConfig(model="tiny", document=document, query="Who?"))
    assert "only retrieves" in note
    assert re.findall(r"--model (\S+)", note)[0] in apb_jax.presets.MODELS


def test_no_other_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does tiny where it has other weights or no text to be asked about."""
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"document": book(tmp_path, 70), "query": "Who?"}
    others = [RunConfig(model=name, **asked) for name in ("smollm2-135m", "llama3.1-8b", "./folder", "owner/name")]
    for config in (*others, RunConfig(model="tiny", weights="random", **asked), RunConfig(model="tiny")):
        assert name_notes(config) == [], config


def test_the_hint_is_on_the_screen_before_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: None
) -> None:
    with pytest.raises(Reached):
        main(["--document", book(tmp_path, 700), "--query", "Who?"])
    out = capsys.readouterr().out
    assert 0 < out.index("only retrieves") < out.index(FRAME[0])


# -- documents and questions that are too long ------------------------------------------------------------------------


def test_too_long_a_document_is_refused_before_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: None
) -> None:
    """A picture of what will not run reads like success; the test above shows that one that fits is drawn."""
    assert main(["--document", book(tmp_path, 49_000), "--query", "Who?", "--sp", "8"]) == 2
    line, rest = errors(capsys)
    assert "tiny has 32768 positions" in line
    assert not set(FRAME) & set(rest), rest
    assert "shard" not in rest


def test_too_long_a_question_is_not_told_to_shorten_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: None
) -> None:
    """Positions less the question are a negative number of tokens, which nobody can shorten a document to."""
    assert main(["--document", book(tmp_path, 70), "--query", "dark and stormy " * 14_000, "--sp", "1"]) == 2
    line, _ = errors(capsys)
    assert "the query alone has" in line
    assert "shorten the document" not in line
    assert not re.search(NEGATIVE, line), line


@pytest.mark.parametrize("new_tokens", [0, 1, 30, 99, 100, 5000])
def test_a_length_that_is_proposed_fits(new_tokens: int) -> None:
    """Every number that the refusal names is positive, and is accepted when it is followed."""
    engine = apb_jax.Engine(random_model(max_positions=100), "full", apb_jax.make_mesh(sp=1))

    def refusal(document: int, query: int, new_tokens: int) -> str | None:
        prompt = engine.prompt(ids(1, document), ids(2, query))
        try:
            engine.check_lengths([prompt], [prompt.query], new_tokens)
        except UserError as error:
            return str(error)
        return None

    refused = 0
    for document, query in itertools.product((1, 40, 99, 400), (1, 60, 98, 99, 100, 101, 400)):
        text = refusal(document, query, new_tokens)
        if document + query + new_tokens <= 100:
            assert text is None
            continue
        assert text is not None
        refused += 1
        assert not re.search(NEGATIVE, text), text
        shorter, fewer = re.search(r"document to (\d+) tokens", text), re.search(r"at most (\d+) new tokens", text)
        assert shorter or fewer or f"the query alone has {query}" in text
        if shorter:
            assert refusal(int(shorter[1]), query, new_tokens) is None
        if fewer:
            assert int(fewer[1]) > 0
            assert refusal(document, query, int(fewer[1])) is None
    assert refused > 10


# -- the layout picture -----------------------------------------------------------------------------------------------


def bars(name: str, tokens: int, shards: int = 8) -> list[tuple[str, str]]:
    """Per shard of the picture: its bar in ASCII, and what stands behind it."""
    rng = np.random.default_rng(0)
    document, query = (rng.integers(1, 96, n).astype(np.int32) for n in (tokens, 9))
    prompt = Prompt(document, query, query)
    setup = Setup(tiny_config(max_positions=2**17), "random", shards, shards, has_heads=True, prompts=(prompt,))
    method, _ = resolve(MethodSpec(name), setup)
    console = Console(width=120, color_system=None)
    with console.capture() as taken:
        console.print(layout_picture(method.layout([prompt], shards), method, {"sp": shards}, plain=True))
    found = re.findall(r"shard +\d+ ([.=#]*)  (.*?) *│", taken.get())
    assert len(found) == shards
    return found


@pytest.mark.parametrize("tokens", [4096, 8192, 65536])
def test_apb_has_shorter_bars_than_full_attention(tokens: int) -> None:
    """The picture is the argument for the method: on the same document, fewer keys are less ink."""
    apb, full = (bars(name, tokens) for name in ("apb", "full"))
    assert apb != full, "not full attention under another name"
    pairs = [(len(ours), len(theirs)) for (ours, _), (theirs, _) in zip(apb, full, strict=True)]
    assert pairs[0][0] == pairs[0][1], "the first shard sees its own block alone"
    assert all(ours < theirs for ours, theirs in pairs[1:]), pairs


def test_the_pictures_of_two_methods_have_one_scale() -> None:
    """Bars of different methods may be laid beside each other: a block is as wide in both, the document WIDTH."""
    apb, full = (bars(name, 8192) for name in ("apb", "full"))
    assert {bar.count(PLAIN["block"]) for bar, _ in (*apb, *full)} == {WIDTH // 8}
    assert len(full[-1][0]) == WIDTH


@pytest.mark.parametrize("name", ["full", "apb", "star", "ring"])
@pytest.mark.parametrize("tokens", [1, 3, 9, 20, 33, 70])
def test_ranges_never_run_backwards(name: str, tokens: int) -> None:
    """Shards that a short text leaves empty say so; the others' ranges are the document, each token once."""
    at = 0
    for bar, text in bars(name, tokens):
        if text == "nothing":
            assert bar == ""
            continue
        first, last = map(int, text.split(".."))
        assert first == at < last <= tokens
        at = last
    assert at == tokens


# -- defaults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No GPU, and as many devices as the command simulates; returns the numbers that were asked for."""
    asked: list[int] = []
    everything = jax.devices
    monkeypatch.setattr("apb_jax.mesh.has_accelerator", lambda: False)
    monkeypatch.setattr("apb_jax.mesh.simulate_devices", asked.append)
    monkeypatch.setattr(jax, "devices", lambda *a: everything(*a)[: asked[-1]])
    return asked


@pytest.mark.parametrize(
    "where", [{}, {"shards": 4}, {"sp": 2}, {"sp": 2, "shards": 4}, {"tp": 2}], ids=lambda where: str(where)
)
@pytest.mark.parametrize("method", ["apb", "full", "ring"])
def test_evals_and_run_split_alike(
    method: str, where: dict[str, int], bare_machine: list[int], stopped: None, tmp_path: Path
) -> None:
    """A score is about the run that people try next: the same parts on the same devices, without flags and with.

    The packaged model as a folder is any other model; under its name it is shown on eight devices.
    """
    model = str(ROOT / "apb_jax" / "tiny")
    with pytest.raises(Reached) as reached:
        run(RunConfig(model=model, method=method, seq=512, **where), Console(quiet=True))
    (engine,) = reached.value.args
    places = [where.get(name, default) for name, default in (("sp", None), ("tp", 1), ("shards", None))]
    system = connect(SystemSpec(model, (method,), {}, None, None, None, *places))(method).describe()
    assert (system["shards"], system["mesh"]) == (engine.shards, dict(engine.mesh.shape))
    assert bare_machine == [where.get("sp", 1) * where.get("tp", 1)] * 2
    if not where:
        assert engine.shards == MethodSpec(method).kind.shards_alone


def help_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Long name of an option -> its lines in the help."""
    monkeypatch.setenv("COLUMNS", "1000")
    text = options.make_parser().format_help().split("\nexamples:")[0]
    entries = re.split(r"\n  (?=-)", text)[1:]
    return {re.match(r"(?:-\w, )?(--[\w-]+)", entry)[0]: " ".join(entry.split()) for entry in entries}  # type: ignore[index]


def test_every_default_is_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to read code to know what a run without flags does."""
    shown = help_of(monkeypatch)
    actions = [action for action in options.make_parser()._actions if action.option_strings and action.nargs != 0]
    settled = [action for action in actions if action.default not in (None, (), [], argparse.SUPPRESS)]
    assert len(settled) > 10
    for action in settled:
        text = shown[action.option_strings[0]]
        value = re.escape(str(action.default))
        assert re.search(rf"default: {value}[,);]|default: {value}$|\b{value} \(default\)", text), text


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--seq", f"default: {DEFAULT_SEQ // 1024}k; a --document whole"),
        ("--max-new-tokens", f"default: {NEW_TOKENS_ABOUT_TEXT} for a --document, else {NEW_TOKENS}"),
        ("--sp", f"without a GPU one device, for tiny {DEFAULT_SIMULATED} simulated ones"),
        ("--shards", f"default: --sp; on one device {APB.shards_alone} where"),
    ],
)
def test_defaults_that_are_settled_later_are_those_of_the_code(
    option: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words in help_of(monkeypatch)[option]


@pytest.mark.parametrize(
    "option",
    "dtype precision kv-dtype attention-dtype heads template separator gpu-memory repeat seq sp shards "
    "max-new-tokens".split(),
)
def test_what_happens_without_an_option(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options whose default depends on machine, model or other options say what it is."""
    assert options.make_parser().get_default(option.replace("-", "_")) is None
    assert re.search(r"default:? \S", help_of(monkeypatch)[f"--{option}"])


def test_the_package_is_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m apb_jax`` is what people type first."""
    calls = []
    monkeypatch.setattr("apb_jax.run.main", lambda: calls.append(sys.argv[1:]) or 7)
    monkeypatch.setattr(sys, "argv", ["apb_jax", "--seq", "512"])
    monkeypatch.delitem(sys.modules, "apb_jax.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("apb_jax", run_name="__main__")
    assert ended.value.code == 7
    assert calls == [["--seq", "512"]]


# -- what is missing --------------------------------------------------------------------------------------------------


def test_a_report_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables hold the figures of the pictures, so that the report is worth having without them."""
    command = "needle --model regex --method full,forgetful --seq 1k --depths 2 --out".split()
    assert fake_system.run([*command, str(tmp_path)]) == 0
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert fake_system.run(["report", str(tmp_path)]) == 0
    assert "error" not in capsys.readouterr().err
    markdown, page = (tmp_path / name for name in ("report.md", "report.html"))
    text = markdown.read_text(encoding="utf-8")
    score = json.loads((tmp_path / "full" / "metrics.json").read_text())["mean_by_length"]["1024"]["score"]
    assert f"| full | {score:.2f} |" in text
    assert "plots need matplotlib" in text
    assert "![" not in text
    assert "<img" not in page.read_text(encoding="utf-8")
    assert list(tmp_path.glob("*.png")) == []


def test_a_clone_is_told_to_install_itself() -> None:
    """The extra belongs to the code that runs here, which is not what an index would bring."""
    assert (ROOT / "pyproject.toml").is_file()
    assert shlex.split(install.install_hint("evals")) == ["pip", "install", "-e", f"{ROOT}[evals]"]


def test_an_installed_package_is_not_told_of_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    assert shlex.split(install.install_hint("evals")) == ["pip", "install", f"{project}[evals]"]


def test_install_hints_name_extras_that_exist() -> None:
    source = "".join(
        path.read_text(encoding="utf-8") for top in ("apb_jax", "evals") for path in (ROOT / top).rglob("*.py")
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    hinted = set(re.findall(r"install_hint\(['\"](\w+)['\"]\)", source))
    assert hinted
    assert hinted <= set(extras)


# -- did you mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "given"),
    [("needle", "--samples"), ("ruler", "--depths"), ("perplexity", "--repeats"), ("latency", "--window")],
)
def test_an_option_of_another_command_is_not_proposed_again(
    command: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The word is known, though not here: "--samples; did you mean --samples?" helps nobody."""
    line = [command, "--model", "regex", "--seq", "1k", "--out", str(tmp_path / "out")]
    for argument in ([given, "3"], [f"{given}=3"]):
        assert fake_system.run([*line, *argument]) == 2
        text, _ = errors(capsys)
        assert f"unrecognized arguments: {given}" in text
        assert f"did you mean {given}?" not in text


def test_a_mistyped_option_still_gets_a_proposal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["needle", "--model", "regex", "--seq", "1k", "--out", str(tmp_path / "out"), "--depth", "3"]
    assert fake_system.run(line) == 2
    assert errors(capsys)[0].endswith("did you mean --depths?")


def test_a_link_to_nowhere_is_not_proposed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder lists the name, and yet there is no such file."""
    (tmp_path / "book.txt").symlink_to(tmp_path / "gone")
    assert near_file(tmp_path / "book.txt") == ""
    (tmp_path / "books.txt").write_text("text")
    assert near_file(tmp_path / "book.txt") == f"; did you mean {tmp_path / 'books.txt'}?"
    assert main(["--document", str(tmp_path / "book.txt"), "--query", "Who?"]) == 2
    assert f"did you mean {tmp_path / 'book.txt'}?" not in errors(capsys)[0]
