"""Conversion and sharded restore of a synthetic checkpoint of real shape: memory, MB/s, share of the disk's read rate.

    python benchmarks/checkpoint.py --folder /big/disk --sp 8            # Llama-3.1-8B shape, 16 GB
    python benchmarks/checkpoint.py --folder /big/disk --layers 8        # a quarter of its depth

Stages, each in a process of its own, so that peaks do not mix: write an HF checkpoint file by file, convert it, read
the result raw with an empty page cache, restore it sharded with an empty page cache, restore it again with a full one.
The restored values are compared with the generated ones. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from apb_jax.command import Parser, command  # noqa: E402

BLOCK = 2**25  # elements of random data, written again and again from other offsets
FILE_BYTES = 5 * 10**9
READ_BYTES = 16 * 2**20


class PeakMemory:
    """Highest anonymous and shared memory of this process while open, from /proc; file mappings can be dropped."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def block() -> Any:
    """Random bf16 weights of ordinary size."""
    import ml_dtypes
    import numpy as np

    return (np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)


def offset(name: str) -> int:
    """Where in the block a tensor's values begin."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % BLOCK


def values(data: Any, name: str, count: int) -> Any:
    """The values of a tensor."""
    import numpy as np

    start = offset(name)
    return np.resize(np.concatenate([data[start:], data[:start]]), count)


def config(layers: int | None) -> Any:
    from apb_jax.presets import MODELS

    preset = MODELS["llama3.1-8b"].config
    return preset if layers is None else replace(preset, num_layers=layers)


def generate(folder: Path, layers: int | None) -> dict[str, Any]:
    """Write the HF checkpoint, one file at a time; host memory: the random block."""
    import math

    from apb_jax.weights.mapping import rules_for, sizes_of

    model, data = config(layers), block()
    sizes = sizes_of(model, None)
    tensors = {name: rule.hf_shape(sizes) for rule in rules_for(model) for name in rule.names(model.num_layers)}
    order = sorted(tensors, key=lambda name: int(name.split(".")[2]) if ".layers." in name else -1)
    files: list[list[str]] = [[]]
    size = 0
    for name in order:
        nbytes = 2 * math.prod(tensors[name])
        if files[-1] and size + nbytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    folder.mkdir(parents=True)

    def write(number: int) -> dict[str, str]:
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        header, position = {}, 0
        for name in files[number]:
            end = position + 2 * math.prod(tensors[name])
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [position, end]}
            position = end
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            for name in files[number]:
                start, left = offset(name), math.prod(tensors[name])
                while left:
                    piece = data[start : start + left]
                    stream.write(memoryview(piece.view("u1")))
                    left -= len(piece)
                    start = 0
        return dict.fromkeys(files[number], file)

    with ThreadPoolExecutor(len(files)) as pool:
        weight_map = {name: file for part in pool.map(write, range(len(files))) for name, file in part.items()}
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model.to_hf()))
    os.sync()
    return {"bytes": total, "files": len(files)}


def convert(source: Path, target: Path, sp: int) -> dict[str, Any]:
    import jax

    from converters.convert import convert_model

    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.float32(0)))
    with PeakMemory() as memory:
        start = time.perf_counter()
        done = convert_model(str(source), target, sp=sp)
        seconds = time.perf_counter() - start
    on_host = done.bytes if jax.default_backend() == "cpu" else 0
    largest = max(_array_bytes(target))
    return {
        "seconds": seconds,
        "MB_per_s": done.bytes / 1e6 / seconds,
        "peak_host_bytes_beyond_start_and_device_copy": memory.peak - memory.start - on_host,
        "largest_array_bytes": largest,
        "within_largest_plus_2GiB": memory.peak - memory.start - on_host <= largest + 2 * 2**30,
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "backend": jax.default_backend(),
    }


def _array_bytes(folder: Path) -> list[int]:
    import math

    from apb_jax.weights.manifest import read_manifest

    manifest = read_manifest(folder)
    assert manifest is not None
    return [math.prod(shape) * (2 if dtype == "bfloat16" else 4) for shape, dtype in manifest.parameters.values()]


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(folder: Path, threads: int) -> dict[str, Any]:
    """Read every byte of a folder with an empty page cache, in large pieces, by several threads."""
    evict(folder)
    pieces = [
        (path, start)
        for path in folder.rglob("*")
        if path.is_file()
        for start in range(0, path.stat().st_size, READ_BYTES)
    ]
    buffers = threading.local()

    def read(piece: tuple[Path, int]) -> int:
        if not hasattr(buffers, "bytes"):
            buffers.bytes = bytearray(READ_BYTES)
        with piece[0].open("rb", buffering=0) as stream:
            stream.seek(piece[1])
            return stream.readinto(buffers.bytes)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, pieces))
    seconds = time.perf_counter() - start
    return {"bytes": total, "seconds": seconds, "MB_per_s": total / 1e6 / seconds, "threads": threads}


def restore(folder: Path, sp: int, cold: bool) -> dict[str, Any]:
    import jax
    import numpy as np
    from flax import nnx

    from apb_jax.mesh import make_mesh
    from apb_jax.weights.checkpoint import load

    mesh = make_mesh(sp=sp)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.float32(0)))
    if cold:
        evict(folder)
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = load(folder, dtype="bf16")
        state = jax.block_until_ready(model.place(mesh))
        seconds = time.perf_counter() - start
    data = block()
    last = model.config.num_layers - 1
    for path, name, turned in (
        ("embedding", "model.embed_tokens.weight", False),
        ("layers.gate", f"model.layers.{last}.mlp.gate_proj.weight", True),
        ("layers.k", "model.layers.0.self_attn.k_proj.weight", True),
    ):
        array = dict(nnx.to_flat_state(state))[tuple(path.split("."))].get_value()
        array = array if path == "embedding" else array[last if "gate" in path else 0]
        ours = np.asarray(array.addressable_shards[-1].data)
        theirs = values(data, name, ours.size).reshape(ours.shape[::-1] if turned else ours.shape)
        if not np.array_equal((theirs.T if turned else theirs).view("u2"), ours.view("u2")):
            raise SystemExit(f"restored {path} differs from {name}")
    nbytes = sum(s.size * s.dtype.itemsize for s in model.shapes().values())
    return {
        "seconds": seconds,
        "MB_per_s": nbytes / 1e6 / seconds,
        "devices": sp,
        "peak_host_bytes_beyond_start": memory.peak - memory.start,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def child(stage: str, *arguments: object, simulate: int = 0) -> dict[str, Any]:
    """Run one stage in a process of its own and return what it printed last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if simulate > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={simulate}"
    command = [sys.executable, __file__, "--stage", stage, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"stage {stage} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{stage} ({time.perf_counter() - start:.1f} s with start-up): {json.dumps(result)}", flush=True)
    return result


@command("python benchmarks/checkpoint.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an empty or new folder on the disk to measure")
    parser.add_argument("--layers", type=int, help="fewer layers than the model's 32")
    parser.add_argument("--sp", type=int, default=1, help="devices to restore onto")
    parser.add_argument("--threads", type=int, default=8, help="threads of the raw read")
    parser.add_argument("--limit", type=float, default=180, help="skip the warm restore after so many seconds")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the folder")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    source, target = args.folder / "hf", args.folder / "orbax"
    stages = {
        "generate": lambda: generate(source, args.layers),
        "convert": lambda: convert(source, target, args.sp),
        "raw_read": lambda: raw_read(target, args.threads),
        "restore": lambda: restore(target, args.sp, args.cold),
    }
    if args.stage:
        print(json.dumps(stages[args.stage]()))
        return
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    common = ["--folder", args.folder, "--sp", args.sp, "--threads", args.threads]
    common += [] if args.layers is None else ["--layers", args.layers]
    args.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        out: dict[str, Any] = {"generate": child("generate", *common)}
        out["convert"] = child("convert", *common, simulate=args.sp if on_cpu else 0)
        if not args.keep:
            shutil.rmtree(source)
        out["raw_read_cold"] = child("raw_read", *common)
        simulate = args.sp if on_cpu else 0
        out["restore_cold"] = child("restore", *common, "--cold", simulate=simulate)
        if time.perf_counter() - start < args.limit:
            out["restore_warm"] = child("restore", *common, simulate=simulate)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)
    out["restore_percent_of_disk"] = 100 * out["restore_cold"]["MB_per_s"] / out["raw_read_cold"]["MB_per_s"]
    from apb_jax.weights.manifest import versions

    out["versions"] = versions() | {"machine": platform.machine()}
    print(json.dumps(out))


if __name__ == "__main__":
    sys.exit(main())
