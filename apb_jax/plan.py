"""``python -m apb_jax.plan``: memory, longest document and seconds of a run, without a GPU and without weights.

    python -m apb_jax.plan --model llama3-8b-1m --seq 1m --gpus 2
    python -m apb_jax.plan --model llama3.1-8b --seq 128k --method full --gpu-memory 40g --json

Exit status: 0 where the document fits, 1 where it does not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from apb_jax.arguments import length, number
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.kv_memory import DEVICE, PLACES
from apb_jax.options import PLACEMENTS, add_precision, gpu_memory

if TYPE_CHECKING:
    from rich.console import Console

    from apb_jax.measure.auto import Calibration
    from apb_jax.measure.devices import DeviceFigures
    from apb_jax.measure.plan import Plan
    from apb_jax.weights.checkpoint import LoadedModel

DEFAULT_DEVICE = "h100"


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m apb_jax.plan``."""
    parser = Parser(
        prog="python -m apb_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="preset, HF folder or HF id")
    parser.add_argument(
        "--seq", type=length, required=True, metavar="LENGTH", help="context length with query and answer: 128k"
    )
    parser.add_argument("--gpus", type=number(int, 1, 1024), default=1, metavar="N", help="devices in all")
    parser.add_argument("--tp", type=number(int, 1, 64), default=1, metavar="M", help="of them tensor-parallel")
    parser.add_argument("--gpu", default=None, metavar="NAME", help=f"whose figures (this GPU, else {DEFAULT_DEVICE})")
    parser.add_argument("--gpu-memory", type=gpu_memory, metavar="SIZE", help="of each GPU, such as 80g (default: its)")
    parser.add_argument("--method", default="apb", metavar="NAME", help="as in apb_jax.run (default: apb)")
    parser.add_argument(
        "--shards", type=number(int, 1, 1024), metavar="N", help="parts of the document, as in apb_jax.run"
    )
    parser.add_argument("--placement", choices=PLACEMENTS, default="contiguous")
    parser.add_argument("--batch", type=number(int, 1, 1024), default=1, metavar="N", help="requests at once")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16", help="default: bf16")
    add_precision(parser)
    parser.add_argument("--kv", choices=PLACES, default=DEVICE, help="where document KV is kept, as in apb_jax.run")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line of standard output")
    return parser


def make_plan(args: argparse.Namespace, model: LoadedModel) -> Plan:
    """The plan of a command line."""
    from apb_jax.attention.registry import MethodSpec
    from apb_jax.measure.memory import NEW_TOKENS, QUERY_TOKENS, Case, hypothetical
    from apb_jax.measure.plan import plan
    from apb_jax.mesh import USABLE
    from apb_jax.precision import FP8, Precision
    from apb_jax.weights.quantised import refusal as refusal_of_fp8
    from pallas_kernels.device import HOPPER

    positions = model.config.max_positions
    if args.seq > positions:
        raise UserError(
            f"--seq {args.seq} exceeds the {positions} positions of {args.model}; nearest legal choice: {positions}"
        )
    tokens = args.seq - QUERY_TOKENS - NEW_TOKENS
    if tokens < 1:
        raise UserError(
            f"--seq {args.seq} leaves no room for a document beside {QUERY_TOKENS + NEW_TOKENS} query and answer tokens"
        )
    if args.gpus % args.tp:
        raise UserError(
            f"--tp {args.tp} does not divide --gpus {args.gpus}; "
            f"nearest legal choice: --gpus {max(1, round(args.gpus / args.tp)) * args.tp}"
        )
    figures, calibration = device_figures(args.gpu, model)
    precision = Precision.of(args.precision, weights=args.weights_dtype, kv=args.kv_dtype)
    fp8 = precision.weights == FP8
    if fp8 and (reason := refusal_of_fp8(model.config, HOPPER, tp=args.tp)):
        raise UserError(f"{args.model} with fp8 weights: {reason}; nearest legal choice: --weights-dtype model")
    devices, method = args.gpus // args.tp, MethodSpec(args.method)
    case = Case(
        config=model.config,
        model=model.name,
        itemsize=model.dtype.itemsize,
        method=method,
        devices=devices,
        tp=args.tp,
        shards=method.shards_on(devices, args.shards),
        order=args.placement,
        retaining_hidden=model.retaining_hidden,
        folded=model.fold_heads,
        fp8=fp8 or model.source.fp8,
        kv=precision.kv,
        kv_memory=args.kv,
    )
    limit = int(USABLE * (args.gpu_memory or figures.memory_bytes))
    return plan(case, [hypothetical(tokens)] * args.batch, limit, figures=figures, calibration=calibration)


def device_figures(name: str | None, model: LoadedModel) -> tuple[DeviceFigures, Calibration | None]:
    """(ceilings of the GPU named, or of this machine's; calibration where the plan is for this machine)."""
    from apb_jax.measure.auto import calibration_path, read_calibration
    from apb_jax.measure.devices import figures_named, figures_of
    from apb_jax.mesh import has_accelerator

    if name is not None or not has_accelerator():
        return figures_named(name or DEFAULT_DEVICE), None
    import jax

    figures = figures_of(jax.devices()[0].device_kind) or figures_named(DEFAULT_DEVICE)
    path = calibration_path(model.config, model.dtype.name)
    return figures, read_calibration(path, model.name) if path.exists() else None


def show(console: Console, found: Plan) -> None:
    """The plan for people."""
    from apb_jax.measure.plan import gib, refusal_of

    case = found.case
    console.print(
        f"{case.model}: {found.document_tokens:,} document tokens under {found.method}, {found.shards} shards on "
        f"sp={case.devices} x tp={case.tp}"
    )
    for name, count in found.memory.components.items():
        console.print(f"  {name.replace('_', ' '):<14} {gib(count):>10}")
    assert found.limit is not None
    console.print(
        f"  {'a device':<14} {gib(found.memory.bytes_per_device):>10}  of {gib(found.limit)} that may be used"
    )
    console.print(
        f"longest document that fits: {found.longest:,} tokens (positions end at {case.config.max_positions:,})"
    )
    if found.memory.host_bytes:
        away = case.config.num_layers - case.kv_layers
        console.print(
            f"memory of the host: {gib(found.memory.host_bytes)} of document KV, {away} of {case.config.num_layers} "
            "layers, read once a token"
        )
    if found.expected is not None:
        console.print(f"prefill: about {found.expected.seconds:.3g} s ({found.expected.basis})")
    console.print("fits" if found.fits else f"does not fit: {refusal_of(found)}")


@command("python -m apb_jax.plan")
def main(argv: list[str]) -> int:
    """Exit status 0: fits; 1: does not; 2: wrong input, with one line on standard error."""
    args = make_parser().parse_args(argv)
    from rich.console import Console

    from apb_jax.weights.checkpoint import load

    found = make_plan(args, load(args.model, weights="random", dtype=args.dtype))
    show(Console(stderr=args.json, soft_wrap=True, highlight=False), found)
    if args.json:
        print(json.dumps(found.to_json()), flush=True)
    return 0 if found.fits else 1


if __name__ == "__main__":
    sys.exit(main())
