"""Files appear whole, with the mode of any new file, or not at all; the picture says the same without colours."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from apb_jax.attention.full import Full
from apb_jax.attention.inputs import Prompt
from apb_jax.errors import UserError
from apb_jax.files import TEXT_BYTES, decode_text, read_json, whole_file, write_json
from apb_jax.measure.auto import Measurement, read_calibration, write_calibration
from apb_jax.screen import MARKS, PLAIN, layout_picture


def test_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    before = os.umask(0o027)
    try:
        write_json(path, [1])
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(UserError, match=r"a\.1"):
        write_json(path, {"a": [0.0, float("nan")]})

    def half() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        half()
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_texts_are_texts(tmp_path: Path) -> None:
    assert decode_text("\ufeffé".encode(), "x") == "é"
    assert decode_text(b"\0" + b"a" * 200, "x")[0] == "\0", "a stray zero byte is a character"
    for raw, words in ((b"a\0b", "binary"), (b"\xff", "not UTF-8"), (b"a" * (TEXT_BYTES + 1), "longer than 64 MiB")):
        with pytest.raises(UserError, match=words):
            decode_text(raw, "x")
    for text in ("[NaN]", "[" * 100_000, '{"a"'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="is not JSON"):
            read_json(tmp_path / "x.json", "x")


def test_calibrations_add_up(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_calibration(path, "cpu", [Measurement("full", 1, 1024, 1.0), Measurement("full", 1, 2048, 2.0)])
    write_calibration(path, "cpu", [Measurement("full", 1, 2048, 3.0), Measurement("ring", 8, 2048, 0.5)])
    assert {(r.method, r.tokens): r.prefill_s for r in read_calibration(path, "tiny").rows} == {
        ("full", 1024): 1.0, ("full", 2048): 3.0, ("ring", 2048): 0.5,
    }  # fmt: skip


def picture(tokens: int, shards: int, plain: bool) -> str:
    prompt = Prompt(np.arange(tokens, dtype=np.int32), *[np.arange(3, dtype=np.int32)] * 2)
    method = Full()
    console = Console(width=100, color_system=None, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    with console.file:
        console.print(layout_picture(method.layout([prompt], shards), method, {"sp": shards}, plain=plain))
    return console.export_text()


def test_the_picture_without_colours() -> None:
    """Kinds of keys differ by their character; no range runs backwards, also where shards are left empty."""
    assert len(set(PLAIN.values())) == len(set(MARKS.values())) == 3
    text = picture(20, 8, plain=False)
    assert MARKS["earlier"] in text
    assert MARKS["block"] in text
    ranges = [
        part.split("..") for line in text.splitlines() for part in line.split() if ".." in part and part[0].isdigit()
    ]
    assert ranges
    assert all(int(low) < int(high) <= 20 for low, high in ranges)
    assert "nothing" in text
    bars = picture(1600, 4, plain=True).splitlines()
    assert "shard  3 " in bars[4]
    assert bars[4].count("#") == 2, "64 of 1,600 tokens are the last block's"
    widths = [line.count("#") + line.count(".") - 2 for line in bars if "shard" in line]
    assert max(widths) == pytest.approx(48, abs=1)  # each kind is rounded
