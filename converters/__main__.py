"""``python -m converters``: hf, gguf, quantize, heads, export, inspect."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from apb_jax.arguments import length, number, one_of, shards, tensor_devices
from apb_jax.command import Parser, command

DTYPE = one_of(("bf16", "float32"))


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="python -m converters", description="Checkpoints in, out and explained.")
    commands = top.add_subparsers(dest="command", required=True)

    hf = commands.add_parser("hf", help="an HF folder or hub id into a folder that loads fast and sharded")
    hf.add_argument("source", metavar="SRC", help="folder or hub id (owner/name)")
    hf.add_argument("--out", type=Path, required=True, metavar="DIR")
    hf.add_argument("--dtype", type=DTYPE, help="bf16 or float32; default: that of the files")
    hf.add_argument("--heads", metavar="FILE", help="retaining heads (safetensors, torch .bin or a hub id) to include")
    hf.add_argument("--fold-heads", action="store_true", help="fold the heads into the QKV projections (same scores)")
    hf.add_argument(
        "--sp", type=shards, default=1, help="devices of the sequence axis to spread the arrays over meanwhile"
    )
    hf.add_argument("--tp", type=tensor_devices, default=1, help="devices of the tensor axis")

    gguf = commands.add_parser("gguf", help="a GGUF file into an HF folder, dequantised")
    gguf.add_argument("source", metavar="FILE", help="GGUF file, or a preset that is one (smollm2-135m)")
    gguf.add_argument("--out", type=Path, required=True, metavar="DIR")
    gguf.add_argument("--dtype", type=DTYPE, help="bf16 or float32; default: every value is kept")

    quantize = commands.add_parser("quantize", help="an HF folder into an FP8-dynamic checkpoint: half the bytes")
    quantize.add_argument("source", metavar="IN", help="folder or hub id (owner/name)")
    quantize.add_argument("--out", type=Path, required=True, metavar="DIR")

    heads = commands.add_parser("heads", help="retaining heads into a safetensors file, names and values kept")
    heads.add_argument("source", metavar="SRC", help="torch .bin, safetensors file (also a whole model), or hub id")
    heads.add_argument("--out", type=Path, required=True, metavar="FILE")
    heads.add_argument("--model", help="the model they must fit: preset, folder or hub id")

    export = commands.add_parser("export", help="a converted folder back to an HF folder")
    export.add_argument("source", metavar="DIR")
    export.add_argument("--out", type=Path, required=True, metavar="HF_FOLDER")

    inspect = commands.add_parser("inspect", help="what is this, and what does it take?")
    inspect.add_argument("path", metavar="PATH", help="model folder, converted folder, preset, hub id, file of heads")
    inspect.add_argument("--heads", metavar="FILE")
    inspect.add_argument("--dtype", type=DTYPE, default="bf16", help="dtype of weights and cache on the devices")
    inspect.add_argument("--sp", type=shards, default=1)
    inspect.add_argument("--tp", type=tensor_devices, default=1)
    inspect.add_argument("--seq", type=length, default="128k", metavar="TOKENS", help="document length, e.g. 128k")
    inspect.add_argument(
        "--memory", type=number(float, 0, 1e6, above=True), default=80.0, metavar="GIB", help="memory of one device"
    )
    inspect.add_argument("--verify", action="store_true", help="hash every file and compare with the manifest")
    return top


@command("python -m converters", resumes="; nothing was kept")
def main(argv: list[str]) -> None:
    """Run one command; 0, or 2 with one line on stderr when the input is at fault."""
    args = parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    run = {"hf": _hf, "gguf": _gguf, "quantize": _quantize, "heads": _heads, "export": _export, "inspect": _inspect}
    run[args.command](args)


class _Bar:
    """A bar with bytes per second and ETA on stderr, as a context manager that is also the progress callback."""

    def __init__(self, title: str) -> None:
        self.title, self.start = title, time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total)
        if done >= total:
            self.bar.update(self.task, description=f"{self.title}, writing")


def _report(what: str, out: Path, nbytes: int, parameters: int, start: float) -> None:
    from converters.inspection import size_text

    seconds = time.perf_counter() - start
    rate = nbytes / 1e6 / max(seconds, 1e-9)
    print(f"{what} {out}: {parameters:,} parameters, {size_text(nbytes)} in {seconds:.1f} s ({rate:.0f} MB/s)")


def _hf(args: argparse.Namespace) -> None:
    from converters.convert import convert_model

    start = time.perf_counter()
    with _Bar("reading") as bar:
        done = convert_model(
            args.source,
            args.out,
            dtype=args.dtype,
            heads=args.heads,
            sp=args.sp,
            tp=args.tp,
            fold_heads=args.fold_heads,
            progress=bar,
        )
    if done.already:
        print(f"{done.folder} is this conversion already; nothing to do")
    else:
        _report("wrote", done.folder, done.bytes, done.parameters, start)


def _gguf(args: argparse.Namespace) -> None:
    from converters.gguf import convert_gguf

    start = time.perf_counter()
    with _Bar("writing") as bar:
        done = convert_gguf(args.source, args.out, dtype=args.dtype, progress=bar)
    _report("wrote", done.folder, done.bytes, done.parameters, start)


def _quantize(args: argparse.Namespace) -> None:
    from converters.quantize import quantize

    start = time.perf_counter()
    with _Bar("writing") as bar:
        done = quantize(args.source, args.out, progress=bar)
    _report("wrote", done.folder, done.bytes, done.parameters, start)


def _heads(args: argparse.Namespace) -> None:
    from converters.convert import convert_heads

    start = time.perf_counter()
    done = convert_heads(args.source, args.out, model=args.model)
    _report("wrote", done.folder, done.bytes, done.parameters, start)


def _export(args: argparse.Namespace) -> None:
    from converters.export import export

    start = time.perf_counter()
    with _Bar("writing") as bar:
        done = export(args.source, args.out, progress=bar)
    _report("wrote", done.folder, done.bytes, done.parameters, start)


def _inspect(args: argparse.Namespace) -> None:
    from converters.inspection import GIB, inspect

    rows = inspect(
        args.path,
        sp=args.sp,
        tp=args.tp,
        tokens=args.seq,
        memory=int(args.memory * GIB),
        heads=args.heads,
        dtype=args.dtype,
        check_hashes=args.verify,
    )
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def _quiet_duplicates() -> None:
    """Keep what is reported once from being printed again by libraries, so that an error stays one line.

    Orbax logs every exception that it raises as well, and after a failed write TensorStore still calls into orbax's
    event loop, which is closed by then.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(raised: sys.UnraisableHookArgs) -> None:
        if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
            show(raised)

    sys.unraisablehook = hook


if __name__ == "__main__":
    _quiet_duplicates()
    sys.exit(main())
