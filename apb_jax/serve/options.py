"""The command line of the server: how the model runs as in ``apb_jax.run``, and how it is served."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apb_jax.arguments import number, size
from apb_jax.command import Parser
from apb_jax.errors import UserError
from apb_jax.files import read_text
from apb_jax.options import KERNELS, PLACEMENTS, RunConfig, _setting, add_precision
from apb_jax.prompt.style import parse_separator, parse_template_arg

DEFAULT = "default"
"""The method of who names none: an exact one."""


@dataclass(frozen=True)
class ServeConfig:
    """One server; see ``--help`` for the meaning of the fields."""

    run: RunConfig = field(default_factory=RunConfig)
    """Model, mesh, method and kernels; what concerns one document or one answer stays at its defaults."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    max_body: int = 64 << 20
    queue: int = 64
    answers: int = 8
    device_bytes: int | None = None
    memory: int | None = None
    sessions: Path | None = None
    sessions_bytes: int = 50 << 30
    max_new_tokens: int = 512
    temperature: float = 0.0
    cors_origin: tuple[str, ...] = ()
    grace: float = 30.0

    def __post_init__(self) -> None:
        for origin in self.cors_origin:
            if not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise UserError(f"--cors-origin {origin!r} is not an origin; write for example https://example.org")

    def keys(self) -> tuple[bytes, ...]:
        """API keys, one a line of the file."""
        if self.api_key_file is None:
            return ()
        lines = [line.encode() for line in read_text(self.api_key_file, "--api-key-file").splitlines()]
        keys = tuple(line.strip() for line in lines if line.strip())
        if not keys:
            raise UserError(f"--api-key-file {self.api_key_file} is empty; it needs a key, one a line")
        return keys


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m apb_jax.serve``."""
    parser = Parser(
        prog="python -m apb_jax.serve",
        description="Serve a model over HTTP: documents are prefilled once and asked often. OpenAI's API under /v1, "
        "a page to ask in at /.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", metavar="NAME", help="preset, HF folder or HF id (default: tiny)")
    group.add_argument("--weights", metavar="PATH|random", help="folder with other weights, or random ones")
    group.add_argument("--heads", metavar="FILE", help="retaining heads (safetensors); default: beside the weights")
    group.add_argument("--template", metavar="NAME", help="chat template: model, none or a published one, as in run")
    group.add_argument("--system", metavar="TEXT", help="a system message in the model's own chat template")
    group.add_argument(
        "--template-arg", action="append", dest="template_args", type=parse_template_arg, default=[],
        metavar="NAME=VALUE", help="a variable of the model's own chat template; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--separator", type=parse_separator, metavar="TEXT", help=r"between document and question (default: \n\n)"
    )
    group.add_argument("--dtype", choices=("bf16", "float32"), help="default: bf16 on GPUs, float32 on CPUs")
    add_precision(group)

    group = parser.add_argument_group("mesh and method")
    group.add_argument(
        "--sp", type=number(int, 1, 1024), metavar="N",
        help="devices on the sequence axis (default: all GPUs; without a GPU one CPU device)",
    )  # fmt: skip
    group.add_argument("--tp", type=number(int, 1, 64), default=1, metavar="M", help="on the tensor axis")
    group.add_argument("--shards", type=number(int, 1, 1024), metavar="N", help="parts of a document (default: --sp)")
    group.add_argument("--placement", choices=PLACEMENTS, default="contiguous", help="shards of a device")
    group.add_argument("--slice-decode", action="store_true", help="decode with 1/sp of the weights on each device")
    group.add_argument(
        "--method", metavar="NAME", help="default: full on one shard, ring on several; the question is not known "
        "while a document is prefilled, so apb needs --set embed_query=false",
    )  # fmt: skip
    group.add_argument("--set", action="append", type=_setting, default=[], metavar="FIELD=VALUE")
    group.add_argument("--kernels", choices=KERNELS, default="auto")

    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    group.add_argument("--port", type=number(int, 0, 65535), default=8000, help="0: a free one (default: 8000)")
    group.add_argument("--api-key-file", metavar="FILE", help="keys that clients must send, one a line")
    group.add_argument("--max-body", type=size(1), default=64 << 20, metavar="SIZE", help="default: 64M")
    group.add_argument("--queue", type=number(int, 1, 100_000), default=64, help="requests that may wait")
    group.add_argument("--answers", type=number(int, 1, 1024), default=8, help="decoded in turn")
    group.add_argument(
        "--device-bytes", type=size(1), metavar="SIZE",
        help="sessions kept on the devices (default: 40%% of the memory that is free behind the weights; 2G on CPUs)",
    )  # fmt: skip
    group.add_argument(
        "--memory", type=size(2**20), metavar="SIZE",
        help="of each device that may be used; what does not fit is refused (default: what the devices say)",
    )  # fmt: skip
    group.add_argument(
        "--sessions", type=Path, metavar="DIR",
        help="folder of this server's own in which sessions survive a restart (default: device memory alone)",
    )  # fmt: skip
    group.add_argument(
        "--sessions-bytes", type=size(2**20), default=50 << 30, metavar="SIZE", help="in that folder (default: 50G)"
    )
    group.add_argument(
        "--max-new-tokens", type=number(int, 1), default=512, metavar="N",
        help="where a request says nothing (default: 512)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=number(float, 0, 2), default=0.0,
        help="where a request says nothing (default: 0, greedy)",
    )  # fmt: skip
    group.add_argument("--cors-origin", action="append", default=[], metavar="URL", help="a page that may ask too")
    group.add_argument(
        "--grace", type=number(float, 0, 86400), default=30.0, metavar="S",
        help="seconds that running answers get after Ctrl-C or SIGTERM (default: 30)",
    )  # fmt: skip
    return parser


def parse(argv: list[str] | None = None) -> ServeConfig:
    """A ServeConfig from a command line; UserError for what is wrong with it."""
    given: dict[str, Any] = vars(make_parser().parse_args(argv))
    names = (
        "model weights heads template system separator dtype precision weights_dtype kv_dtype attention_dtype sp tp "
        "shards placement slice_decode kernels"
    ).split()
    run = RunConfig(
        method=given.pop("method") or DEFAULT, options=tuple(given.pop("set")),
        template_args=tuple(given.pop("template_args")),
        **{name: given.pop(name) for name in names},
    )  # fmt: skip
    return ServeConfig(run=run, **(given | {"cors_origin": tuple(given["cors_origin"])}))
