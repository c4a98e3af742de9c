"""``python -m converters``: round trips bit for bit, any mesh from any mesh, bad input, kills, a full disk."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_checkpoints import tiny_config, write_checkpoint
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from apb_jax.errors import UserError
from apb_jax.model.config import ModelConfig
from apb_jax.rope.llama3 import Llama3Rope
from apb_jax.rope.yarn import YarnRope
from apb_jax.weights import orbax_folder, stream
from apb_jax.weights.checkpoint import load
from apb_jax.weights.manifest import MANIFEST_FILE
from converters import export
from converters.__main__ import main

HEADS = "retaining_heads.safetensors"


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def arrays(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(p): np.asarray(leaf.get_value()) for p, leaf in nnx.to_flat_state(state)}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(bits(array), bits(other[name]), err_msg=name)


CONFIGS = {
    "llama": tiny_config(rope=Llama3Rope(500000.0, 8.0, 1.0, 4.0, 64)),
    "tied": tiny_config(tie_embeddings=True),
    "mistral": tiny_config("mistral"),
    "qwen2": tiny_config("qwen2", rope=YarnRope(1e6, 4.0, 64)),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_hf_to_orbax_to_hf_is_bit_exact(
    name: str, dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "in", CONFIGS[name], heads=True, shards=2, dtype=dtype)
    (source / "generation_config.json").write_text("{}")
    converted, back = tmp_path / "orbax", tmp_path / "out"
    assert main(["hf", str(source), "--out", str(converted)]) == 0
    if name == "llama":  # the layout of a large model: one file per rule and an index
        monkeypatch.setattr(export, "SINGLE_FILE_BYTES", 1)
    assert main(["export", str(converted), "--out", str(back)]) == 0
    weights = {n: a for f in source.glob("model*.safetensors") for n, a in load_file(f).items()}
    same(weights, {n: a for f in back.glob("model*.safetensors") for n, a in load_file(f).items()})
    same(load_file(source / HEADS), load_file(back / HEADS))
    for file in ("config.json", "generation_config.json"):
        assert (back / file).read_bytes() == (source / file).read_bytes()
    assert load(back).config == CONFIGS[name]


@pytest.mark.parametrize("transposes", ["host", "device"])
def test_orbax_restores_onto_any_mesh(transposes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if transposes == "device":  # as on GPUs, a few layers at a time
        monkeypatch.setattr(stream, "HOST_TRANSPOSES", frozenset())
        monkeypatch.setattr(stream, "STAGING_BYTES", 2500)
    monkeypatch.setattr(orbax_folder, "CHUNK_BYTES", 500)  # many chunks per array
    monkeypatch.setattr(orbax_folder, "GROUP_BYTES", 6000)  # several restore calls
    source = write_checkpoint(tmp_path / "in", heads=True)
    assert main(["hf", str(source), "--out", str(tmp_path / "o"), "--sp", "4", "--tp", "2"]) == 0
    want = arrays(load(source, dtype="bf16").place(None))
    for shape in (None, (1, 1), (8, 1), (2, 2), (1, 2)):
        mesh = None
        if shape:
            devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
            mesh = Mesh(devices, ("sp", "tp"))
        model = load(tmp_path / "o", dtype="bf16")
        seen: list[tuple[int, int]] = []
        state = model.place(mesh, lambda done, total, seen=seen: seen.append((done, total)))
        same(want, arrays(state))
        assert len(seen) > 1
        assert seen[-1][0] == seen[-1][1]
        for path, sharding in model.shardings(mesh).items():
            leaf = dict(nnx.to_flat_state(state))[tuple(path.split("."))].get_value()
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
    as_float = arrays(load(tmp_path / "o", dtype="float32").place(None))
    same(as_float, {path: array.astype(np.float32) for path, array in want.items()})


def test_other_heads_replace_those_of_a_converted_folder(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in")
    other = write_checkpoint(tmp_path / "other", heads=True) / HEADS
    assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 0
    assert load(tmp_path / "o").retaining_hidden is None
    with_heads = load(tmp_path / "o", heads=other, dtype="bf16")
    same(
        arrays(with_heads.place(None)),
        arrays(load(source, heads=other, dtype="bf16").place(None)),
    )


def test_running_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in")
    out = tmp_path / "o"
    assert main(["hf", str(source), "--out", str(out)]) == 0
    assert main(["hf", str(source), "--out", str(out)]) == 0
    assert "already" in capsys.readouterr().out
    other = write_checkpoint(tmp_path / "in2", tiny_config(num_layers=4))
    assert main(["hf", str(other), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_manifest_says_what_was_done(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", heads=True)
    main(["hf", str(source), "--out", str(tmp_path / "o")])
    manifest = json.loads((tmp_path / "o" / MANIFEST_FILE).read_text())
    assert set(manifest["source_files"]) == {"model.safetensors", HEADS}
    assert all(len(record["sha256"]) == 64 for record in manifest["files"].values())
    assert "model.layers.{layer}.self_attn.q_proj.weight [QD, E] -> layers.q transposed" in manifest["mapping"]
    assert {"jax", "orbax-checkpoint", "apb-jax"} <= manifest["versions"].keys()


def test_heads_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", heads=True)
    whole = load_file(source / "model.safetensors") | load_file(source / HEADS)
    save_file(whole, tmp_path / "whole.safetensors")  # what a trainer saves: the model and its heads in one file
    out = tmp_path / "heads.safetensors"
    assert main(["heads", str(tmp_path / "whole.safetensors"), "--out", str(out), "--model", str(source)]) == 0
    same(load_file(out), load_file(source / HEADS))
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "(8, 64) BF16, 3 times" in capsys.readouterr().out


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "in", heads=True, shards=2)
    main(["hf", str(source), "--out", str(tmp_path / "o")])
    capsys.readouterr()
    for path in (source, tmp_path / "o"):
        assert main(["inspect", str(path), "--sp", "2", "--tp", "2", "--seq", "4k"]) == 0
        out = capsys.readouterr().out
        assert f"{tiny_config().parameters:,}" in out
        assert "sp=2 tp=2, 4096 tokens, bfloat16" in out
        assert "width 8" in out
    assert main(["inspect", str(tmp_path / "o"), "--verify"]) == 0
    assert "files agree with the manifest" in capsys.readouterr().out


# --- bad input: (arguments after the damage, words of the one line) ---


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def torch_zip(file: Path, content: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def change_config(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def largest(folder: Path) -> Path:
    return max((f for f in (folder / "weights").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


HF = ["hf", "{in}", "--out", "{target}"]
EXPORT = ["export", "{orbax}", "--out", "{target}"]
BAD: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "truncated": (lambda d: truncate(d / "in/model.safetensors"), HF, ["model.safetensors", "truncated"]),
    "flipped byte": (lambda d: flip(d / "back/model.safetensors"), ["hf", "{back}", "--out", "{target}"], ["SHA-256"]),
    "missing shard": (
        lambda d: next((d / "shards").glob("*00002*")).unlink(),
        ["hf", "{shards}", "--out", "{target}"],
        ["missing: model-00002-of-00003.safetensors"],
    ),
    "wrong config": (lambda d: change_config(d / "in", hidden_size=32), HF, ["(48, 24)", "demands (48, 32)"]),
    "unsupported": (lambda d: change_config(d / "in", model_type="gpt2"), HF, ["'gpt2'", "llama, mistral, qwen2"]),
    "no config": (lambda d: (d / "in/config.json").unlink(), HF, ["no config.json"]),
    "broken config": (lambda d: (d / "in/config.json").write_text("{"), HF, ["config.json", "JSON"]),
    "only bin": (
        lambda d: (d / "in/model.safetensors").rename(d / "in/pytorch_model.bin"), HF, ["pytorch_model.bin"],
    ),
    "heads of another model": (
        lambda d: None, [*HF, "--heads", "{wide}/" + HEADS], ["(8, 96)", "(8, 64)", "another model"],
    ),
    "heads for no model": (
        lambda d: None, ["heads", "{wide}/" + HEADS, "--out", "{target}", "--model", "{in}"], ["another model"],
    ),
    "no heads inside": (
        lambda d: None, ["heads", "{in}/model.safetensors", "--out", "{target}"], ["no retaining heads"],
    ),
    "malicious pickle": (
        lambda d: torch_zip(d / "evil.bin", pickle.dumps({"a": Malicious(d / "pwned")}, protocol=2)),
        ["heads", "{dir}/evil.bin", "--out", "{target}"],
        ["posix.system", "plain tensor"],
    ),
    "malicious heads": (
        lambda d: torch_zip(d / "evil.bin", pickle.dumps(Malicious(d / "pwned"), protocol=4)),
        [*HF, "--heads", "{dir}/evil.bin"],
        ["posix.system"],
    ),
    "not torch": (
        lambda d: (d / "x.bin").write_bytes(b"\x80\x02}q\x00."), ["heads", "{dir}/x.bin", "--out", "{target}"],
        ["zip format"],
    ),
    "plain numbers": (
        lambda d: torch_zip(d / "x.bin", pickle.dumps({"a": 1}, protocol=2)),
        ["heads", "{dir}/x.bin", "--out", "{target}"], ["plain tensors"],
    ),
    "no such model": (lambda d: None, ["hf", "llama3.1-9b", "--out", "{target}"], ["did you mean 'llama3.1-8b'"]),
    "source is a file": (lambda d: None, ["hf", "{in}/config.json", "--out", "{target}"], ["is a file"]),
    "dtype": (lambda d: None, [*HF, "--dtype", "int4"], ["--dtype is 'int4'", "bf16, float32"]),
    "tp": (lambda d: None, [*HF, "--tp", "3"], ["tp=3", "2 KV heads"]),
    "sp": (lambda d: None, [*HF, "--sp", "0"], ["--sp is 0", "between 1 and 1024"]),
    "converted already": (lambda d: None, ["hf", "{orbax}", "--out", "{target}"], ["converted folder already"]),
    "export of an HF folder": (lambda d: None, ["export", "{in}", "--out", "{target}"], ["no converted folder"]),
    "altered weights": (lambda d: flip(largest(d / "orbax")), EXPORT, ["SHA-256", "a byte differs"]),
    "truncated weights": (lambda d: truncate(largest(d / "orbax")), EXPORT, ["bytes, the manifest says"]),
    "lost weights": (lambda d: largest(d / "orbax").unlink(), EXPORT, ["is missing; the manifest lists it"]),
    "edited config": (lambda d: change_config(d / "orbax", num_hidden_layers=4), EXPORT, ["layers.", "demands (4,"]),
    "damaged manifest": (lambda d: (d / "orbax" / MANIFEST_FILE).write_text("{}"), EXPORT, ["is damaged"]),
    "unfinished": (
        lambda d: (d / "orbax").rename(d / "orbax.partial"), ["inspect", "{orbax}.partial"], ["unfinished"],
    ),
    "target inside a file": (
        lambda d: None, ["hf", "{in}", "--out", "{in}/config.json/target"], ["cannot write", "Not a directory"],
    ),
    "seq": (lambda d: None, ["inspect", "{in}", "--seq", "long"], ["'long'", "128k"]),
    "float16": (
        lambda d: save_file(
            {n: a.astype(np.float16) for n, a in load_file(d / "in/model.safetensors").items()},
            d / "in/model.safetensors",
        ),
        HF, ["float16", "--dtype"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_checkpoint(folder / "in")
    write_checkpoint(folder / "shards", shards=3)
    write_checkpoint(folder / "wide", tiny_config(num_heads=8), heads=True)
    assert main(["hf", str(folder / "in"), "--out", str(folder / "orbax")]) == 0
    assert main(["export", str(folder / "orbax"), "--out", str(folder / "back")]) == 0
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, arguments, words = BAD[case]
    folder = tmp_path / "d"
    shutil.copytree(material, folder)
    damage(folder)
    places = {name: folder / name for name in ("in", "shards", "wide", "orbax", "back")}
    filled = [a.format(**places, dir=folder, target=folder / "target") for a in arguments]
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not list(folder.glob("target*"))
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hf", "in"], "the following arguments are required: --out"),
        (["hg", "in"], "invalid choice: 'hg'"),
        (["hf", "in", "--out", "o", "--tp", "two"], "--tp is 'two'; it must be a whole number"),
    ],
)
def test_wrong_command_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_disk_that_is_too_small(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(["hf", str(material / "in"), "--out", str(tmp_path / "o")]) == 2
    assert "has 0.00 GB free; the output takes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    """A limit on file sizes in a child process: writes fail half-way, as on a full disk."""
    write_checkpoint(tmp_path / "in", tiny_config(vocab_size=40000))
    command = [sys.executable, "-m", "converters", "hf", str(tmp_path / "in"), "--out", str(tmp_path / "o")]
    limited = ["sh", "-c", 'ulimit -f 200; exec "$0" "$@"', *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_writes_that_fail_beside_the_reported_one_stay_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of several writes that hit the full disk, orbax awaits one; asyncio logs the others when it collects them."""
    logger = logging.getLogger("asyncio")
    before = list(logger.filters)
    try:
        orbax_folder._report_once(tmp_path)
        for text in (f"OUT_OF_RANGE: writing {tmp_path}/d/1: File too large", "another mistake"):
            logger.error("Task exception was never retrieved", exc_info=ValueError(text))
        logger.error("no exception at all")
    finally:
        logger.filters[:] = before
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == ["another mistake", "None"]


def test_two_conversions_into_one_place(tmp_path: Path) -> None:
    from apb_jax.weights.atomic import staged_folder

    with staged_folder(tmp_path / "o") as partial:
        (partial / "x").write_text("x")
        with pytest.raises(UserError, match="another conversion"), staged_folder(tmp_path / "o"):
            pass
        assert (partial / "x").exists()
    assert (tmp_path / "o" / "x").exists()


def test_config_survives(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        assert isinstance(config, ModelConfig)
        source = write_checkpoint(tmp_path / name, config)
        assert main(["hf", str(source), "--out", str(tmp_path / f"{name}-o")]) == 0
        assert load(tmp_path / f"{name}-o").config == config


def test_tokenizer_travels_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    source = write_checkpoint(tmp_path / "in")
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["hf", str(source), "--out", str(tmp_path / "o")]) == 0
    assert main(["export", str(tmp_path / "o"), "--out", str(tmp_path / "back")]) == 0
    for folder in (source, tmp_path / "o", tmp_path / "back"):
        tokenizer = load(folder).tokenizer
        assert tokenizer is not None
        assert tokenizer.encode("two one three", add_special_tokens=False) == [1, 0, 2]
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* does not load"):
        load(source)
