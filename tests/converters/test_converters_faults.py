"""Converters against what goes wrong outside: changed sources, two writers, bombs, links, power cuts, umasks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file

from apb_jax.errors import UserError
from apb_jax.json_text import parse_json
from apb_jax.weights import atomic
from apb_jax.weights.atomic import PARTIAL, staged_file, staged_folder
from apb_jax.weights.torch_bin import read_torch_bin
from converters.__main__ import main


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.lstrip("\n")  # behind a progress bar
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_changed_weights_of_the_same_size_are_another_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_checkpoint(tmp_path / "in", heads=True), tmp_path / "o"
    assert main(["hf", str(source), "--out", str(out)]) == 0
    weights = source / "model.safetensors"
    whole, before = weights.read_bytes(), weights.stat()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # not even the time tells
    assert weights.stat().st_size == before.st_size
    capsys.readouterr()
    assert main(["hf", str(source), "--out", str(out)]) == 2
    assert "exists" in one_line(capsys)
    weights.write_bytes(whole)
    assert main(["hf", str(source), "--out", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert main(["hf", str(source), "--out", str(out)]) == 2
    assert "exists" in one_line(capsys)


def test_two_writers_of_one_heads_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first writes; the file is the first one's, whole."""
    source = write_checkpoint(tmp_path / "in", heads=True) / "retaining_heads.safetensors"
    out = tmp_path / "heads.safetensors"
    with staged_file(out) as partial:
        partial.write_bytes(b"first")
        assert main(["heads", str(source), "--out", str(out)]) == 2
        assert "another conversion" in one_line(capsys)
        assert partial.read_bytes() == b"first"
        assert not out.exists()
    assert out.read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir() if PARTIAL in path.name] == []


WRITER = """
import sys
from pathlib import Path
from apb_jax.errors import UserError
from apb_jax.weights.atomic import staged_file
try:
    with staged_file(Path(sys.argv[1])) as partial:
        with partial.open("wb") as file:
            for _ in range(200):
                file.write(sys.argv[2].encode() * 1000)
                file.flush()
except UserError as error:
    print(error)
"""


def test_many_processes_write_one_file_whole(tmp_path: Path) -> None:
    out = tmp_path / "heads"
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(out), letter], stdout=subprocess.PIPE, text=True)
        for letter in "abc"
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    content = out.read_bytes()
    assert len(content) == 200_000
    assert len(set(content)) == 1
    assert said.count("") == 1  # one wrote, the others have their line
    assert all("another conversion" in line or "exists" in line for line in said if line)
    assert [path.name for path in tmp_path.iterdir()] == ["heads"]


def torch_zip(file: Path, content: bytes, compression: int) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("x/data.pkl", content)
    return file


def test_a_small_file_does_not_become_a_large_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.3 MB of zip hold a 300 MB pickle: refused before it is inflated, in little memory."""
    import tracemalloc

    file = torch_zip(tmp_path / "bomb.bin", b"\x80\x02" + b"N0" * 150_000_000 + b"}.", zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**20
    tracemalloc.start()
    assert main(["heads", str(file), "--out", str(tmp_path / "out")]) == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert "compressed" in one_line(capsys)


def test_a_short_pickle_does_not_ask_for_a_long_memo(tmp_path: Path) -> None:
    content = b"\x80\x02}" + b"r" + struct.pack("<I", 2**30) + b"."
    with pytest.raises(UserError, match="numbers 1073741824 objects in 9 bytes"):
        read_torch_bin(torch_zip(tmp_path / "memo.bin", content, zipfile.ZIP_STORED))
    deep = pickle.dumps({}, 2)[:-1] + b"(" * 10 + b"."
    with pytest.raises(UserError, match="is refused"):
        read_torch_bin(torch_zip(tmp_path / "marks.bin", deep, zipfile.ZIP_STORED))


DEEP = "[" * 200_000


def test_deeply_nested_text_is_damaged_text() -> None:
    for text in (DEEP, DEEP.encode(), '{"a":' * 200_000):
        with pytest.raises(json.JSONDecodeError, match="nested too deeply"):
            parse_json(text)
    assert parse_json('{"a": [1]}') == {"a": [1]}


def deep_header(folder: Path) -> None:
    text = ('{"x":' + DEEP).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "config": lambda folder: (folder / "config.json").write_text(DEEP),
    "generation": lambda folder: (folder / "generation_config.json").write_text(DEEP),
    "manifest": lambda folder: (folder / "apb_jax_manifest.json").write_text(DEEP),
    "index": lambda folder: (folder / "model.safetensors.index.json").write_text(DEEP),
    "header": deep_header,
    "tokenizer settings": lambda folder: [
        (folder / name).write_text(DEEP) for name in ("tokenizer_config.json", "tokenizer.json")
    ],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_deeply_nested_files_of_a_checkpoint(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in")
    DAMAGE[damage](source)
    assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 2
    one_line(capsys)
    assert not (tmp_path / "o").exists()


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in")
    secret = tmp_path / "secret.json"
    secret.write_text("mine")
    (source / "notes.json").symlink_to(secret)
    assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 2
    assert "notes.json is a link to" in one_line(capsys)
    assert not (tmp_path / "o").exists()
    (source / "notes.json").unlink()
    (source / "notes.json").symlink_to("config.json")  # inside: its content, as a file
    assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 0
    copied = tmp_path / "o" / "notes.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (source / "config.json").read_bytes()
    (tmp_path / "o" / "more.txt").symlink_to(secret)
    assert main(["export", str(tmp_path / "o"), "--out", str(tmp_path / "back")]) == 2
    assert not (tmp_path / "back").exists()


def test_the_hub_caches_links_are_the_checkpoints_own(tmp_path: Path) -> None:
    """models--x--y/snapshots/REVISION/config.json -> ../../blobs/..., as the hub lays it out."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    write_checkpoint(snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "config.json", blobs / "1234")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    assert main(["hf", str(snapshot), "--out", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("kind", [staged_folder, staged_file])
def test_all_is_on_the_disk_before_the_rename_and_the_rename_after_it(
    kind: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, its folder, then the rename, then the parent: in this order a power cut leaves all or nothing."""
    events: list[str] = []
    sync, rename = atomic.sync, Path.rename

    def noted_sync(path: Path) -> None:
        events.append(f"sync {path.relative_to(tmp_path)}")
        sync(path)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(f"rename {target.relative_to(tmp_path)}")
        return rename(path, target)

    monkeypatch.setattr(atomic, "sync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    with kind(tmp_path / "out") as partial:
        if kind is staged_file:
            partial.write_bytes(b"x")
        else:
            (partial / "inner").mkdir()
            (partial / "inner" / "x").write_bytes(b"x")
    inside = ["sync out.partial/out"] if kind is staged_file else ["sync out.partial/inner", "sync out.partial/inner/x"]
    assert events == [*inside, "sync out.partial", "rename out", "sync ."]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", heads=True)
    before = os.umask(umask)
    try:
        assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 0
        assert main(["export", str(tmp_path / "o"), "--out", str(tmp_path / "back")]) == 0
        heads = tmp_path / "heads.safetensors"
        assert main(["heads", str(source / "retaining_heads.safetensors"), "--out", str(heads)]) == 0
    finally:
        os.umask(before)
    files = [path for name in ("o", "back") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {path.stat().st_mode & 0o777 for path in (*files, heads)} == {mode}
    assert load_file(heads)


def test_an_error_leaves_nothing_and_a_killed_writers_rest_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "heads"
    (tmp_path / "heads.partial").mkdir()
    (tmp_path / "heads.partial" / "old").write_bytes(b"half")

    def fail() -> None:
        with staged_file(out) as partial:
            assert list(partial.parent.iterdir()) == []
            partial.write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with staged_file(out) as partial:
        save_file({"x": np.zeros(3, np.float32)}, partial)
    assert load_file(out)["x"].shape == (3,)
