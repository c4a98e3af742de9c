"""RunConfig: everything a run was asked for. The only place where a command line's strings become types."""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb_jax import arguments
from apb_jax.arguments import count, number
from apb_jax.command import Parser
from apb_jax.errors import UserError
from apb_jax.files import check_input, check_output_folder, near_file, read_stdin, read_text, shown
from apb_jax.kv_memory import DEVICE, PLACES
from apb_jax.precision import CHOICES, MODEL, WORDS, Precision
from apb_jax.prompt.style import PromptStyle, parse_separator, parse_template_arg

DEFAULT_SEQ = 8192
KERNELS = ("auto", "reference", "xla_chunked", "triton", "cudnn", "mosaic_gpu")
PLACEMENTS = ("contiguous", "zigzag")


def parse_rope(text: str) -> str:
    """An argparse type: "string", or "yarn:FACTOR"."""
    name, _, factor = text.partition(":")
    if text == "string":
        return text
    if name != "yarn":
        raise UserError(f"--rope is {text!r}; it must be string, or yarn:FACTOR such as yarn:4")
    try:
        number(float, 1, 1024)(factor)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"the factor of --rope yarn {error}") from error
    return text


def _setting(text: str) -> tuple[str, Any]:
    """An argparse type: FIELD=VALUE with a Python literal or a word as value."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value:
        raise UserError(f"--set {text!r} is not of the form FIELD=VALUE, for example --set order=plain")
    words = {"true": True, "false": False, "none": None}
    try:
        return name, words[value.lower()] if value.lower() in words else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


gpu_memory = arguments.size(2**20)
"""An argparse type: memory of a device; less than a MiB is a forgotten unit."""


def add_precision(group: Any) -> None:
    """The flags of `Precision` to a parser or a group of one."""
    group.add_argument(
        "--precision",
        choices=WORDS,
        help="fp8: 8-bit floats wherever there are any, emulated on CPUs (default: bf16, the dtype of --dtype)",
    )
    group.add_argument(
        "--weights-dtype", choices=CHOICES["weights"], help="of the layers' matrices, in place of --precision's"
    )
    group.add_argument(
        "--kv-dtype",
        type=lambda text: MODEL if text == "bf16" else text,
        choices=CHOICES["kv"],
        help="of the document's keys and values: fp8 or int8 with a scale a token and head, half the bytes in memory, "
        "on disk and in APB's exchange (default: model, the dtype of --dtype)",
    )
    group.add_argument(
        "--attention-dtype",
        type=lambda text: MODEL if text == "bf16" else text,
        choices=CHOICES["attention"],
        help="of the products of the prefill's attention: fp8 on Hopper, emulated on CPUs (default: model, the dtype "
        "of --dtype)",
    )


def split_method(text: str) -> tuple[str, Precision | None]:
    """A method of --compare with its precision: "apb@bf16"; None: that of the run."""
    name, at, word = text.partition("@")
    if at and word not in WORDS:
        raise UserError(f"--compare {text!r}: behind @ comes a precision, {' or '.join(WORDS)}")
    return name, Precision.of(word) if at else None


@dataclass(frozen=True)
class RunConfig:
    """One run of ``python -m apb_jax.run``; see ``--help`` for the meaning of the fields."""

    model: str = "tiny"
    weights: str | None = None
    heads: str | None = None
    fold_heads: bool = False
    template: str | None = None
    system: str | None = None
    separator: str | None = None
    template_args: tuple[tuple[str, Any], ...] = ()
    seq: int | None = None
    sp: int | None = None
    tp: int = 1
    shards: int | None = None
    placement: str = "contiguous"
    kv: str = DEVICE
    slice_decode: bool = False
    gpu_memory: int | None = None
    method: str = "apb"
    options: tuple[tuple[str, Any], ...] = ()
    kernels: str = "auto"
    bottom_right_query: bool = False
    document: str | None = None
    query: str | None = None
    needle: str | None = None
    depth: float = 0.5
    seed: int = 0
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    dtype: str | None = None
    precision: str | None = None
    weights_dtype: str | None = None
    kv_dtype: str | None = None
    attention_dtype: str | None = None
    compare: tuple[str, ...] = ()
    mass: bool = True
    repeat: int | None = None
    rope: str | None = None
    string_offset: float = 0.33
    string_local: int = 128
    json: bool = False
    save: str | None = None
    save_session: str | None = None
    session: str | None = None
    profile: str | None = None
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        self._check_session()
        if self.document is not None and self.query is None and self.save_session is None:
            raise UserError(f"--document {self.document} comes without a question; add --query TEXT")
        if self.query is not None and self.document is None and self.session is None:
            raise UserError("--query asks about a document; add --document FILE (or - for standard input)")
        if self.query is not None and not self.query.strip():
            raise UserError("--query is empty; it needs at least one word")
        if self.document is not None and self.needle is not None:
            raise UserError("--needle hides digits in a generated document; it cannot be combined with --document")
        if self.needle is not None and not re.fullmatch(r"[0-9]{1,32}", self.needle):
            raise UserError(f"--needle is {self.needle!r}; it must be 1 to 32 digits, for example 8675309")
        if self.document not in (None, "-"):
            check_input(str(self.document), "--document")
        if self.heads is not None and not Path(self.heads).is_file():
            raise UserError(f"--heads {shown(self.heads)}: no such file{near_file(Path(self.heads))}")
        if self.weights not in (None, "random") and not Path(str(self.weights)).is_dir():
            raise UserError(f"--weights {self.weights}: no such folder; give a folder with *.safetensors, or 'random'")
        if self.heads is not None and self.weights == "random":
            raise UserError("--heads has no meaning with --weights random; drop one of the two")
        for name in ("save", "profile", "save_session"):
            if (folder := getattr(self, name)) is not None:
                check_output_folder(folder, f"--{name.replace('_', '-')}")
        twice = [name for name in self.method_options if [n for n, v in self.options if v is not None].count(name) > 1]
        if twice:
            raise UserError(f"{twice[0]} is given twice, by --set and by a flag or another --set; give it once")
        for text in self.compare:
            name, precision = split_method(text)
            if name == self.method and (precision or self.precisions) == self.precisions:
                other = next(word for word in WORDS if Precision.of(word) != self.precisions)
                raise UserError(
                    f"--compare {text} is the method itself; compare with another one, such as full, or with it at "
                    f"another precision: {name}@{other}"
                )
        if not self.mass and not self.compare:
            raise UserError("--no-mass leaves a measurement of --compare out; add --compare METHOD, or drop it")
        if self.method == "auto" and self.method_options:
            raise UserError(f"--method auto decides itself; drop {sorted(self.method_options)} or name a method")

    def _check_session(self) -> None:
        """What goes together with a session that is saved or loaded."""
        given = "--session" if self.session is not None else "--save-session" if self.save_session is not None else None
        if given is None:
            return
        if self.session is not None and self.save_session is not None:
            raise UserError("--session loads and --save-session saves; give one of the two")
        if self.session is not None and self.query is None:
            raise UserError(f"--session {self.session} comes without a question; add --query TEXT")
        if self.save_session is not None and self.document is None:
            raise UserError(f"--save-session {self.save_session} comes without a document; add --document FILE")
        for flag, value in (("--compare", self.compare), ("--needle", self.needle), ("--save", self.save)):
            if value:
                raise UserError(f"{flag} cannot be combined with {given}; drop one of the two")
        if self.save_session is not None and Path(self.save_session).exists():
            raise UserError(f"--save-session {shown(self.save_session)} exists; choose another folder, or remove it")
        if self.method == "auto" or (self.session is not None and self.seq is not None):
            flag = "--method auto" if self.method == "auto" else "--seq"
            raise UserError(f"{flag} cannot be combined with {given}; drop it or name a method")

    @property
    def prompt_style(self) -> PromptStyle:
        """How text becomes a prompt."""
        return PromptStyle(self.template, self.system, self.separator, dict(self.template_args))

    @property
    def precisions(self) -> Precision:
        """What ``--precision`` and the flags of its fields say."""
        return Precision.of(
            self.precision, weights=self.weights_dtype, kv=self.kv_dtype, attention=self.attention_dtype
        )

    @property
    def yarn_factor(self) -> float | None:
        """What ``--rope yarn:FACTOR`` stretches positions by."""
        return float(self.rope.partition(":")[2]) if self.rope and self.rope.startswith("yarn:") else None

    @property
    def method_options(self) -> dict[str, Any]:
        """Options given for the method, without those left to their presets."""
        return {name: value for name, value in self.options if value is not None}

    def read_document(self) -> str:
        """The text of ``--document``; refuses what is empty, binary, too long or not UTF-8."""
        assert self.document is not None
        name = "standard input" if self.document == "-" else self.document
        text = read_stdin("--document -") if self.document == "-" else read_text(self.document, "--document")
        if not text.strip():
            raise UserError(f"--document {name} is empty ({len(text.encode())} bytes); it needs at least one word")
        return text


EPILOG = """examples:
  python -m apb_jax.run                                  find a hidden number, packaged model, 8 simulated devices
  python -m apb_jax.run --seq 16k --depth 0.2 --compare full
                                                         the same at 16K tokens, beside full attention, with a receipt
  python -m apb_jax.run --document book.txt --query "Who is Coxon?"
  python -m apb_jax.run --model llama3.1-8b --seq 128k   Llama 3.1 8B (weights from the HF cache) on all GPUs
  python -m apb_jax.run --model llama3.1-8b --seq 128k --weights random --sp 8 --json
                                                         a benchmark without weights; the last line is JSON
"""


def add_joining(parser: argparse._ActionsContainer) -> None:
    """Options by which a process joins a run of several; SLURM and mpirun need none."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: address of process 0")
    parser.add_argument("--processes", type=count(1, 65536), metavar="N", help="how many processes")
    parser.add_argument("--process", type=count(0), metavar="I", help="which one this is")


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m apb_jax.run``."""
    parser = Parser(
        prog="python -m apb_jax.run",
        description="Answer a question about a long document. The document is split over the sequence axis of a device "
        "mesh; APB makes its prefill cheap, and decoding over the sharded cache is exact.",
        epilog=EPILOG,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", metavar="NAME", help="preset, HF folder or HF id (default: tiny)")
    group.add_argument(
        "--weights", metavar="PATH|random", help="folder with other weights, or random ones (benchmarks)"
    )
    group.add_argument("--heads", metavar="FILE", help="retaining heads (safetensors); default: beside the weights")
    group.add_argument(
        "--fold-heads",
        action="store_true",
        help="fold the retaining heads into the QKV projections while loading: scores then cost one smaller product",
    )
    group.add_argument(
        "--template",
        metavar="NAME",
        help="chat template: model (its own, the default where it has one), none, or a published one to reproduce its "
        "figures: llama3, qwen, mistral, question, base",
    )
    group.add_argument("--system", metavar="TEXT", help="a system message in the model's own chat template")
    group.add_argument(
        "--template-arg",
        action="append",
        dest="template_args",
        type=parse_template_arg,
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the model's own chat template, such as enable_thinking=false; may be repeated",
    )
    group.add_argument(
        "--separator", type=parse_separator, metavar="TEXT", help=r"between document and question (default: \n\n)"
    )
    group.add_argument("--dtype", choices=("bf16", "float32"), help="default: bf16 on GPUs, float32 on CPUs")
    add_precision(group)

    group = parser.add_argument_group("input")
    group.add_argument("--document", metavar="FILE|-", help="UTF-8 text file, or - for standard input")
    group.add_argument("--query", metavar="TEXT", help="the question about --document")
    group.add_argument("--needle", metavar="DIGITS", help="hide these digits in a generated document and ask for them")
    group.add_argument("--depth", type=number(float, 0, 1), default=0.5, help="where: 0 start, 1 end")
    group.add_argument(
        "--seq",
        type=arguments.length,
        metavar="LENGTH",
        help="context length of a generated document with query and answer, or the most that is kept of --document "
        "(start and end); 8192, 8k, 128k, 1m (default: 8k; a --document whole)",
    )
    group.add_argument("--seed", type=arguments.seed, default=0, help="of filler, random digits and sampling")

    group = parser.add_argument_group("mesh")
    group.add_argument(
        "--sp",
        type=arguments.shards,
        metavar="N",
        help="devices on the sequence axis (default: all GPUs; without a GPU one device, for tiny 8 simulated ones)",
    )
    group.add_argument("--tp", type=arguments.tensor_devices, default=1, metavar="M", help="devices on the tensor axis")
    group.add_argument(
        "--shards",
        "--virtual-shards",
        type=arguments.shards,
        metavar="N",
        help="parts of the document, a multiple of --sp (default: --sp; on one device 8 where a method needs them)",
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="contiguous",
        help="shards of a device: neighbours, or pairs i and N-1-i, which gives every device the same work",
    )
    group.add_argument(
        "--kv",
        choices=PLACES,
        default=DEVICE,
        help="where the document's keys and values are kept: host for documents that the devices do not hold; every "
        "token of the answer then reads them all over the host's link",
    )
    group.add_argument(
        "--slice-decode",
        action="store_true",
        help="while answering, every device reads 1/sp of the weights, which the prefill holds whole",
    )
    group.add_argument(
        "--gpu-memory",
        type=gpu_memory,
        metavar="SIZE",
        help="most memory of a device, such as 80g; what needs more is refused (default: what JAX may take of a GPU)",
    )
    add_joining(group)

    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        default="apb",
        metavar="NAME",
        help="apb (default); exact: full, ring, ulysses; approximate: star, starx, starx_sparse, streaming, "
        "minference, xattention, infllm, locret, spava; auto: by what python -m apb_jax.calibrate measured here",
    )
    group.add_argument(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="FIELD=VALUE",
        help="a hyper-parameter of the method, such as --method ring --set order=plain; may be repeated",
    )
    group.add_argument(
        "--rope",
        type=parse_rope,
        metavar="string|yarn:FACTOR",
        help="remapped positions (STRING) under the method, or positions stretched by FACTOR (YaRN)",
    )
    group.add_argument(
        "--string-offset",
        type=number(float, 0, above=True),
        default=0.33,
        metavar="SHARE|TOKENS",
        help="distance from which keys are shifted",
    )
    group.add_argument("--string-local", type=count(0), default=128, metavar="TOKENS", help="rows kept near")
    group.add_argument(
        "--anchor", type=count(0), metavar="TOKENS", help="APB: anchor, query included (default: by length)"
    )
    group.add_argument("--passing", type=count(0), metavar="TOKENS", help="APB: passed per shard (default: by length)")
    group.add_argument(
        "--query-at", type=count(0), metavar="INDEX", help="APB: query in the anchor (default: behind the opening)"
    )
    group.add_argument(
        "--scorer",
        choices=("heads", "query", "expected", "reconstruct"),
        help="APB: retaining heads, or training-free (default: heads where there are any); all but query can prefill "
        "without the question (--set embed_query=false)",
    )
    group.add_argument(
        "--bottom-right-query",
        action="store_true",
        help="reproduce the published code's causal mask of the query phase on shards without the query",
    )
    group.add_argument("--kernels", choices=KERNELS, default="auto", help="prefill attention; a name never falls back")
    group.add_argument(
        "--compare",
        type=arguments.names,
        default=(),
        metavar="METHOD,...",
        help="run these on the same input too and print what the method changed against each (the receipt); with "
        "@bf16 or @fp8 at that precision, such as apb@bf16",
    )

    group.add_argument(
        "--no-mass",
        action="store_false",
        dest="mass",
        help="with --compare: leave out the recovered attention mass, which costs a prefill with twice the attention",
    )
    group.add_argument(
        "--repeat",
        type=count(0, 1000),
        metavar="N",
        help="timed prefills after the first, which compiles; the median counts (default: 1 with --compare, else 0)",
    )

    group = parser.add_argument_group("answer and output")
    group.add_argument(
        "--max-new-tokens",
        type=count(1),
        metavar="N",
        help="default: 512 for a --document, else 32",
    )
    group.add_argument("--temperature", type=number(float, 0), default=0.0, help="0 is greedy")
    group.add_argument("--top-p", type=number(float, 0.0001, 1), default=1.0, help="nucleus sampling")
    group.add_argument("--json", action="store_true", help="a JSON object as the last line of standard output")
    group.add_argument("--save", metavar="DIR", help="write run.json, and run.md for people, there")
    group.add_argument(
        "--save-session",
        metavar="DIR",
        help="keep the prefilled --document in a new folder; without a --query nothing is asked, and apb prefills "
        "without the question",
    )
    group.add_argument(
        "--session", metavar="DIR", help="ask --query of a document kept by --save-session, on any number of shards"
    )
    group.add_argument("--profile", metavar="DIR", help="write a jax.profiler trace of the run there")
    return parser


def parse(argv: list[str] | None = None) -> RunConfig:
    """A RunConfig from a command line; UserError for what is wrong with it."""
    given = vars(make_parser().parse_args(argv))
    names = {"anchor": "anchor_tokens", "passing": "passing_tokens", "query_at": "query_at", "scorer": "scorer"}
    options = tuple((field, given.pop(flag)) for flag, field in names.items()) + tuple(given.pop("set"))
    return RunConfig(options=options, template_args=tuple(given.pop("template_args")), **given)
