"""The engine: one model and one method on one mesh; documents in, sessions and answers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from apb_jax import host_kv
from apb_jax.ahead import compile_ahead
from apb_jax.attention.inputs import Kernels, Prompt
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.attention.placement import ORDERS, Placement
from apb_jax.attention.registry import MethodSpec, refusal, resolve
from apb_jax.batching import answer_batch, common_method
from apb_jax.errors import UserError
from apb_jax.generation import Answer, Wanted, wanted_of
from apb_jax.host_kv import HostCache
from apb_jax.kv_codes import CODES
from apb_jax.kv_memory import DEVICE, HOST, PLACES
from apb_jax.mesh import SP, TP, make_mesh
from apb_jax.model.slices import WeightSlices
from apb_jax.precision import FP8, MODEL, Precision
from apb_jax.prefill import PrefillRows, run
from apb_jax.programs import Lengths, Programs
from apb_jax.prompt.codec import make_codec
from apb_jax.prompt.ids import Text, make_prompt
from apb_jax.prompt.style import NONE, PromptStyle
from apb_jax.quantised_cache import AnyCache
from apb_jax.session import Session, is_batch
from apb_jax.typed import check_items, check_names, check_types, check_value
from apb_jax.weights.checkpoint import LoadedModel
from apb_jax.weights.fingerprint import fingerprint
from apb_jax.weights.quantised import refusal as refusal_of_fp8
from pallas_kernels import device
from pallas_kernels.flash_attention.eight_bit import EightBit
from pallas_kernels.flash_attention.mosaic_gpu import refuse_arrays
from pallas_kernels.float8 import CUBLAS_ONLY


class Progress(Protocol):
    """Told of every stage: its name, how far it is, and of how many steps."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """A listener that listens to nothing."""


@dataclass(frozen=True)
class Settings:
    """How an engine runs its method."""

    kernels: Kernels = field(default_factory=Kernels)
    prompt_style: PromptStyle = field(default_factory=PromptStyle)
    shards: int | None = None
    """Parts of the document, a multiple of the devices on the sequence axis; None: one a device.

    For exact methods the devices alone count: more shards would change nothing.
    """
    placement: str = "contiguous"
    """Which shards a device holds: "contiguous", or "zigzag" (pairs i and N-1-i)."""
    slice_decode: bool = False
    """Query and decoding steps read 1 / sp of the weights on each device (``model/slices.py``)."""
    bottom_right_query: bool = False
    """The originals' causal quirk of the query phase (thunlp/APB's code, not its paper)."""
    precision: Precision = field(default_factory=Precision)
    """In which types weights, KV and attention are held and multiplied."""
    kv_memory: str = DEVICE
    """Where the document's KV is kept: "device", or "host" (``host_kv.py``)."""
    kv_layers: int = 0
    """Of KV in the host's memory the layers that stay on the devices all the same."""
    answers_only: bool = False
    """Never prefill, only answer from loaded sessions: also on meshes on which the method could not prefill."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.shards is not None and self.shards < 1:
            raise UserError(f"--shards is {self.shards}; it must be at least 1")
        if self.placement not in ORDERS:
            raise UserError(f"placement {self.placement!r} is unknown; choose one of {', '.join(ORDERS)}")
        if self.kv_memory not in PLACES:
            raise UserError(f"kv_memory {self.kv_memory!r} is unknown; choose one of {', '.join(PLACES)}")
        if self.kv_layers < 0:
            raise UserError(f"kv_layers is {self.kv_layers}; it must be at least 0")


class Weights:
    """A model's weights on a mesh, read when first needed and shared by the engines beside each other."""

    def __init__(self, model: LoadedModel, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.state: nnx.State | None = None

    def placed(self, progress: Callable[[int, int], None]) -> nnx.State:
        """The weights, on the devices."""
        if self.state is None:
            self.state = self.model.place(self.mesh, progress)
        return self.state

    @cached_property
    def fingerprint(self) -> str:
        """Their fingerprint by content; they must have been placed."""
        assert self.state is not None
        return fingerprint({".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(self.state)})


class Engine:
    """Answers questions about long documents; programs and weights stay on the devices between calls."""

    def __init__(
        self,
        model: LoadedModel,
        method: AttentionMethod | MethodSpec | str = "apb",
        mesh: Mesh | None = None,
        *,
        settings: Settings | None = None,
        progress: Progress | None = None,
        beside: Engine | None = None,
        **changes: Any,
    ) -> None:
        """``changes``: fields of ``Settings``, such as ``shards=8``; ``virtual_shards`` is another name of that one.

        ``beside``: another engine of the same model, mesh and settings, whose weights and programs this one shares.
        """
        check_value("model", model, LoadedModel)
        check_value("method", method, AttentionMethod, MethodSpec, str)
        check_value("mesh", mesh, Mesh, type(None))
        check_value("settings", settings, Settings, type(None))
        check_value("beside", beside, Engine, type(None))
        self.model, self.mesh = model, mesh if mesh is not None else make_mesh()
        if "virtual_shards" in changes:
            changes["shards"] = changes.pop("virtual_shards")
        check_names("an engine", changes, (one.name for one in fields(Settings)))
        self.settings = replace(settings or Settings(), **changes)
        self.method = MethodSpec(method) if isinstance(method, str) else method
        self.progress: Progress = progress or silent
        self.codec = make_codec(model.tokenizer, model.name, self.settings.prompt_style) if model.tokenizer else None
        self.template = self.codec.frame.name if self.codec else NONE
        check_mesh(model, self.mesh)
        model = self.model = self._quantised(model)
        check_kv(self.settings.precision.kv)
        kernels = kernels_of(self.settings, model)
        if not self.settings.answers_only:
            self.check_method(batch=1)
        sizes = self.mesh.shape
        slices = WeightSlices.over(model.config, SP, sizes[SP], sizes[TP]) if self.settings.slice_decode else None
        shared = beside is not None and beside.mesh == self.mesh and beside.model.fp8 == model.fp8
        self._home: Weights = beside._home if beside is not None and shared else Weights(model, self.mesh)
        self.programs: Programs
        if beside is not None and shared and beside.programs.same(kernels, slices, self.settings.precision):
            self.programs = beside.programs
        else:
            self.programs = Programs(
                config=model.config,
                graph=model.graph(),
                specs=model.partitions(),
                mesh=self.mesh,
                kernels=kernels,
                slices=slices,
                compiler_options=CUBLAS_ONLY if model.fp8 and device.current().platform == "gpu" else None,
                precision=self.settings.precision,
            )
        self.listen(progress)

    def _quantised(self, model: LoadedModel) -> LoadedModel:
        """The model with matrices as the precision says, or in 8 bits as its checkpoint has them."""
        settings = self.settings
        fp8 = settings.precision.weights == FP8 or model.source.fp8
        if fp8:
            self.settings = replace(settings, precision=replace(settings.precision, weights=FP8))
            sizes = self.mesh.shape
            slices = sizes[SP] if settings.slice_decode else 1
            if reason := refusal_of_fp8(model.config, device.current(), tp=sizes[TP], slices=slices):
                raise UserError(f"{model.name} with fp8 weights: {reason}; nearest legal choice: --weights-dtype model")
        return model if model.fp8 == fp8 else replace(model, fp8=fp8)

    def listen(self, progress: Progress | None) -> None:
        """Tell this listener of every stage from now on."""
        self.progress = progress or silent
        self.programs.on_compile = lambda name: self.progress(f"compile {name}", 0, 1)

    @property
    def can(self) -> Capabilities:
        """What the engine's method can do."""
        return self.method.can

    def check_method(self, batch: int) -> None:
        """Refuse what the method cannot do on such a model, mesh and batch."""
        reason = refusal(self.method, self.setup(batch))
        if reason is not None:
            raise UserError(reason)
        if self.can.block_sparse and self.settings.precision.attention == FP8:
            raise UserError(
                f"--attention-dtype fp8: {self.method.name} attends through block_sparse_attention, which has no 8-bit "
                "products; nearest legal choice: --weights-dtype fp8 --kv-dtype fp8, without --precision"
            )

    def setup(self, batch: int, prompts: Sequence[Prompt] = ()) -> Setup:
        """What the method may know when it is chosen."""
        return Setup(
            config=self.model.config,
            model=self.model.name,
            shards=self.shards,
            devices=self.mesh.shape[SP],
            tp=self.mesh.shape[TP],
            batch=batch,
            has_heads=self.model.retaining_hidden is not None,
            query_at=self.codec.query_at if self.codec else 0,
            prompts=tuple(prompts),
        )

    @property
    def state(self) -> nnx.State:
        """The weights on the mesh; read when first asked for, after every request could be refused."""
        return self._home.placed(lambda done, total: self.progress("load weights", done, total))

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the weights by content (``weights/fingerprint.py``); taken once."""
        self.state  # noqa: B018 - places them
        return self._home.fingerprint

    @property
    def placement(self) -> Placement:
        """Which shards of the document stand on which device."""
        devices, settings = self.mesh.shape[SP], self.settings
        return Placement.for_method(self.can.exact, settings.shards, devices, settings.placement)

    @property
    def shards(self) -> int:
        """Shards of the document."""
        return self.placement.shards

    def with_method(self, method: AttentionMethod | MethodSpec | str, **changes: Any) -> Engine:
        """The same model and weights under another method; the same programs where no setting changes."""
        return Engine(
            self.model, method, self.mesh, settings=self.settings, progress=self.progress, beside=self, **changes
        )

    # ---- text ------------------------------------------------------------------------------------------------------

    def prompt(self, document: Text, query: Text, embedded_query: Text | None = None) -> Prompt:
        """Token ids of one request; text needs a tokenizer."""
        make = self.codec.prompt if self.codec else make_prompt
        return make(document, query, embedded_query)

    def generate(
        self,
        document: Text | Sequence[Text],
        query: Text | Sequence[Text],
        max_new_tokens: int = 32,
        *,
        embedded_query: Text | None = None,
        **options: Any,
    ) -> Answer | list[Answer]:
        """Answer ``query`` about ``document``: text or token ids; a list of either is a batch and gives a list.

        Every answer is the one that its request would get alone (see ``batching``).

        ``options``: those of ``Session.start``: ``sampler``; ``seed``; ``stop_ids`` (ids that end an answer and are not
        part of it; default: the template's and the model's); ``logits``; ``on_tokens(request, ids)``, called as tokens
        arrive. Raises UserError for input that cannot be served, before anything runs.
        """
        wanted_of(self, max_new_tokens, **options)
        batch = is_batch(document)
        documents = list(document) if batch else [document]
        queries = list(query) if is_batch(query) else [query] * len(documents)
        if len(queries) != len(documents):
            raise UserError(f"{len(documents)} documents and {len(queries)} queries; give one query, or one each")
        prompts = [self.prompt(d, q, embedded_query) for d, q in zip(documents, queries, strict=True)]  # type: ignore[arg-type]
        self.check_lengths(prompts, [prompt.query for prompt in prompts], max_new_tokens)
        answers = answer_batch(self, prompts, max_new_tokens, **options)
        return answers if batch else answers[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer by default."""
        own = self.codec.stop_ids if self.codec else ()
        return tuple(dict.fromkeys((*own, *self.model.stop_ids, *self.model.config.eos_ids)))

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def choose(self, prompts: list[Prompt]) -> tuple[AttentionMethod, tuple[str, ...]]:
        """The one method for these prompts, and what the user should know about it (budgets, fallback to full)."""
        if len(prompts) > 1:
            return common_method(self, prompts)
        return resolve(self.method, self.setup(1, prompts))

    def prefill(self, prompts: list[Prompt], wanted: Wanted | None = None) -> Session:
        """Run the documents through all layers; the returned session answers from their KV cache.

        ``wanted``: what the prompts' own queries will be asked with; its programs are compiled beside the prefill's.
        """
        steps = self.prefill_steps(prompts, wanted)
        while True:
            try:
                next(steps)
            except StopIteration as finished:
                session: Session = finished.value
                return session

    def prefill_steps(
        self, prompts: list[Prompt], wanted: Wanted | None = None
    ) -> Generator[tuple[int, int], None, Session]:
        """The prefill cut between groups of layers: yields (layers done, of how many), returns the session.

        Close the generator to cancel. Times count its own work alone, not what runs between two steps.
        """
        if not prompts:
            raise UserError("an empty list of documents; give at least 1")
        check_value("prompts", prompts, list, tuple)
        check_items("prompts", prompts, Prompt)
        if self.settings.answers_only:
            raise UserError("this engine was made with answers_only, for loaded sessions; make another one to prefill")
        self.check_method(len(prompts))
        self.check_lengths(prompts, [prompt.query for prompt in prompts])
        method, notes = self.choose(prompts)
        programs, placement, layers = self.programs, self.placement, self.model.config.num_layers
        layout = method.layout(prompts, placement.shards)
        asked = np.asarray([len(p.query) for p in prompts], np.int32)
        lengths = programs.place(Lengths.of(layout, asked, placement))
        empty = (len(prompts), layout.shards * layout.kept_capacity, self.model.dtype)
        rows = PrefillRows(programs.place_rows(layout.positions, placement), lengths)
        tokens = programs.place_rows(layout.tokens, placement)
        weights = self.state  # read before the clock starts
        prefill_s = compile_s = 0.0
        compiled_before, started = programs.compile_s, time.perf_counter()
        steps: Iterator[tuple[int, AnyCache | HostCache | None]]
        if self.settings.kv_memory == HOST:
            steps = host_kv.prefill(programs, method, weights, tokens, rows, empty, self.settings.kv_layers)
        else:
            begun = programs.document_cache(*empty)
            if wanted is not None:
                compile_ahead(self, method, rows, begun, max(len(p.query) for p in prompts), wanted)
            steps = ((done, state.cache) for done, state in run(programs, method, weights, tokens, rows, begun))
        cache: AnyCache | HostCache | None = None
        for done, kept in steps:
            cache = kept
            compiled = programs.compile_s - compiled_before
            compile_s += compiled
            prefill_s += time.perf_counter() - started - compiled
            self.progress("prefill", done, layers)
            yield done, layers
            compiled_before, started = programs.compile_s, time.perf_counter()
        assert cache is not None
        return Session(self, method, layout, prompts, lengths, cache, prefill_s, compile_s, notes)

    def load_session(self, folder: str | Path, documents: Sequence[np.ndarray] | None = None) -> Session:
        """A session that ``Session.save`` wrote; see ``session_store.reader.load``."""
        from apb_jax.session_store.reader import load

        return load(self, folder, documents)

    def check_lengths(self, prompts: list[Prompt], queries: list[np.ndarray], new_tokens: int = 0) -> None:
        """Refuse what the model's positions or vocabulary cannot hold, the answer included."""
        positions = self.model.config.max_positions
        for prompt, query in zip(prompts, queries, strict=True):
            total = len(prompt.document) + len(query)
            if total + new_tokens > positions:
                room = positions - len(query) - new_tokens
                ask = f"ask for at most {positions - total} new tokens" if total < positions else ""
                shorten = f"shorten the document to {room} tokens (--seq keeps start and end)" if room > 0 else ""
                raise UserError(
                    f"document and query have {total} tokens"
                    + (f", with {new_tokens} new ones {total + new_tokens}" if new_tokens else "")
                    + f"; {self.model.name} has {positions} positions"
                    + (f" ({self.model.config.window_note}); " if self.model.config.window_note else "; ")
                    + (" or ".join(filter(None, (shorten, ask))) or f"the query alone has {len(query)}: shorten it")
                )
            for name, ids in (("document", prompt.document), ("query", query)):
                self.check_ids(name, ids)

    def check_ids(self, name: str, ids: np.ndarray) -> None:
        """Refuse token ids outside the vocabulary."""
        last = self.model.config.vocab_size - 1
        if len(ids) and (ids.min() < 0 or ids.max() > last):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"the {name} has token id {bad}; ids lie in 0..{last}")


def check_mesh(model: LoadedModel, mesh: Mesh) -> None:
    """Refuse a mesh of other axes, and a tensor axis that does not divide heads or FFN."""
    if tuple(mesh.axis_names) != (SP, TP):
        raise UserError(f"the mesh has axes {mesh.axis_names}; it must have {SP!r} and {TP!r}: make_mesh(sp, tp)")
    tp, config = mesh.shape[TP], model.config
    for name, size in (("KV heads", config.num_kv_heads), ("FFN columns", config.intermediate_size)):
        if size % tp:
            legal = [n for n in range(1, tp + 1) if config.num_kv_heads % n == 0 and config.intermediate_size % n == 0]
            raise UserError(
                f"--tp {tp} does not divide {model.name}'s {size} {name}; nearest legal choice: --tp {legal[-1]}"
            )


def check_kv(kv: str) -> None:
    """Refuse 8-bit keys and values on a GPU that has no instruction for them; CPUs run the same arithmetic."""
    here = device.current()
    if kv not in CODES or here.compute_capability is None or here.compute_capability >= CODES[kv].capability:
        return
    legal = next((word for word, code in CODES.items() if here.compute_capability >= code.capability), MODEL)
    own, least = (".".join(map(str, pair)) for pair in (here.compute_capability, CODES[kv].capability))
    raise UserError(
        f"--kv-dtype {kv} needs compute capability {least} or newer, {here.name} has {own}; "
        f"nearest legal choice: --kv-dtype {legal}"
    )


def kernels_of(settings: Settings, model: LoadedModel) -> Kernels:
    """The kernels with the precision of attention; refused where a GPU cannot multiply so. CPUs emulate it."""
    if settings.precision.attention != FP8:
        return settings.kernels
    here = device.current()
    if here.platform == "gpu" and (reason := refuse_arrays(model.dtype, model.config.head_dim, here)):
        raise UserError(f"--attention-dtype {FP8}: {reason}; nearest legal choice: --attention-dtype model")
    return replace(settings.kernels, eight=EightBit())
