"""The engine: layout -> prefill -> query -> decode, for one model and one method on one mesh."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from apb_jax.attention.apb import APB
from apb_jax.attention.full import Full
from apb_jax.attention.inputs import Kernels, Prompt
from apb_jax.attention.layout import Layout, bucket
from apb_jax.attention.method import AttentionMethod, Capabilities
from apb_jax.attention.registry import METHODS, MethodSpec, Request
from apb_jax.cache import DocumentCache, TailCache
from apb_jax.errors import UserError
from apb_jax.measure.recovered import RecoveredMass, sample_rows, why_not
from apb_jax.mesh import SP, TP, make_mesh
from apb_jax.model.slices import WeightSlices
from apb_jax.model.transformer import partition_specs
from apb_jax.presets import APB_BUDGETS, APB_BUDGETS_OF, TEMPLATES, template_of
from apb_jax.programs import Lengths, Programs
from apb_jax.prompt import PromptCodec, Text, find_template, make_prompt
from apb_jax.sampling import Sampler
from apb_jax.weights.checkpoint import LoadedModel

CHUNK = 16
"""Tokens decoded on the devices before the host looks: what is streamed at a time."""
STOP_IDS = 8
"""Stop ids a decode program is compiled for."""


class Progress(Protocol):
    """Told of every stage: its name, how far it is, and of how many steps."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """A listener that listens to nothing."""


@dataclass(frozen=True)
class Answer:
    """What one request got, and what it cost. Times are of the whole batch; compilation is apart."""

    text: str
    tokens: list[int]
    method: AttentionMethod
    document_tokens: int
    query_tokens: int
    prefill_s: float
    """Document prefill: from the first layer to the last shard's KV being there."""
    query_s: float
    """Query phase up to the logits of the first answer token."""
    decode_s: float
    compile_s: float
    notes: tuple[str, ...] = ()
    query_logits: np.ndarray | None = field(default=None, repr=False)
    """float32 [query tokens, V], on request."""
    step_logits: np.ndarray | None = field(default=None, repr=False)
    """float32 [answer tokens, V]: row t is what token t was taken from; on request."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Document tokens over prefill time."""
        return self.document_tokens / self.prefill_s

    @property
    def decode_ms_per_token(self) -> float | None:
        """Mean over the tokens after the first one; None where there was none."""
        later = len(self.tokens) - 1
        return 1e3 * self.decode_s / later if later > 0 else None


class Engine:
    """Answers questions about long documents; programs and weights stay on the devices between calls."""

    def __init__(
        self,
        model: LoadedModel,
        method: AttentionMethod | MethodSpec | str = "apb",
        mesh: Mesh | None = None,
        *,
        kernels: Kernels | None = None,
        template: str | None = None,
        bottom_right_query: bool = False,
        progress: Progress | None = None,
        virtual_shards: int = 1,
        slice_decode: bool = False,
        programs: Programs | None = None,
        state: Any = None,
    ) -> None:
        """``bottom_right_query``: the originals' causal quirk of the query phase (thunlp/APB's code, not its paper).

        ``virtual_shards``: split the document into so many shards on one device (``apb_jax.virtual``).
        ``slice_decode``: query and decoding steps read 1 / sp of the weights on each device (``model/slices.py``).
        ``programs`` and ``state``: those of another engine of the same model and mesh (see ``with_method``).
        """
        self.model, self.mesh = model, mesh if mesh is not None else make_mesh()
        self.method = MethodSpec(method) if isinstance(method, str) else method
        self.bottom_right_query = bottom_right_query
        self.progress: Progress = progress or silent
        found = template_of(model.name) or (find_template(model.tokenizer) if model.tokenizer else "base")
        self.template = template or found
        if self.template not in TEMPLATES:
            raise UserError(f"unknown template {self.template!r}; there are: {', '.join(TEMPLATES)}")
        self.codec = PromptCodec(model.tokenizer, TEMPLATES[self.template]) if model.tokenizer else None
        check_mesh(model, self.mesh)
        self.virtual_shards = virtual_shards
        if virtual_shards < 1 or (virtual_shards > 1 and self.mesh.size > 1):
            raise UserError(
                f"virtual_shards is {virtual_shards} on {self.mesh.size} devices; more than 1 needs one device"
            )
        self.check_method(batch=1)
        sizes = self.mesh.shape
        slices = WeightSlices.over(model.config, SP, sizes[SP], sizes[TP]) if slice_decode else None
        graph = model.graph()
        self.state = state if state is not None else self._place(model)
        self.programs = programs or Programs(
            config=model.config,
            graph=graph,
            specs=partition_specs(self.state),  # type: ignore[arg-type]
            mesh=self.mesh,
            kernels=kernels or Kernels(),
            virtual_shards=virtual_shards,
            slices=slices,
        )
        self.listen(progress)

    def listen(self, progress: Progress | None) -> None:
        """Tell this listener of every stage from now on."""
        self.progress = progress or silent
        self.programs.on_compile = lambda name: self.progress(f"compile {name}", 0, 1)

    @property
    def can(self) -> Capabilities:
        """What the engine's method can do."""
        return METHODS[self.method.name][0].can if isinstance(self.method, MethodSpec) else type(self.method).can

    def check_method(self, batch: int) -> None:
        """Refuse what the method cannot do on such a model, mesh and batch."""
        kind = METHODS[self.method.name][0] if isinstance(self.method, MethodSpec) else type(self.method)
        given = self.method.options if isinstance(self.method, MethodSpec) else vars(self.method)
        reason = kind.refuse(self.model.config, self.shards, batch, self.mesh.shape[TP], given)
        asked = isinstance(self.method, MethodSpec) and given.get("scorer") == "heads"
        if reason is None and (kind.can.needs_heads or asked) and self.model.retaining_hidden is None:
            reason = f"method {kind.name!r} needs retaining heads and {self.model.name} has none; give --heads FILE"
        if reason is not None:
            raise UserError(reason)

    def _place(self, model: LoadedModel) -> Any:
        """The weights on the mesh."""
        return model.place(self.mesh, lambda done, total: self.progress("load weights", done, total))

    @property
    def shards(self) -> int:
        """Shards of the document."""
        return self.mesh.shape[SP] * self.virtual_shards

    def with_method(self, method: AttentionMethod | MethodSpec | str) -> Engine:
        """The same model, weights and programs under another method."""
        return Engine(
            self.model,
            method,
            self.mesh,
            template=self.template,
            bottom_right_query=self.bottom_right_query,
            progress=self.progress,
            virtual_shards=self.virtual_shards,
            programs=self.programs,
            state=self.state,
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
        sampler: Sampler = Sampler(),  # noqa: B008 - frozen
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        logits: bool = False,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> Answer | list[Answer]:
        """Answer ``query`` about ``document``: text or token ids; a list of either is a batch and gives a list.

        ``stop_ids``: ids that end an answer and are not part of it (default: the template's and the model's).
        ``on_tokens(request, ids)`` is called as tokens arrive. Raises UserError for input that cannot be served.
        """
        batch = is_batch(document)
        documents = list(document) if batch else [document]
        queries = list(query) if is_batch(query) else [query] * len(documents)
        if len(queries) != len(documents):
            raise UserError(f"{len(documents)} documents and {len(queries)} queries; give one query, or one each")
        prompts = [self.prompt(d, q, embedded_query) for d, q in zip(documents, queries, strict=True)]  # type: ignore[arg-type]
        answers = self.prefill(prompts).generate(
            max_new_tokens, sampler=sampler, seed=seed, stop_ids=stop_ids, logits=logits, on_tokens=on_tokens
        )
        return answers if batch else answers[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer by default."""
        own = self.codec.stop_ids if self.codec else ()
        return tuple(dict.fromkeys((*own, *self.model.config.eos_ids)))[:STOP_IDS]

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def choose(self, prompts: list[Prompt]) -> tuple[AttentionMethod, tuple[str, ...]]:
        """The method for these prompts, and what the user should know about it (budgets, fallback to full)."""
        notes: list[str] = []
        method = self.method
        if isinstance(method, MethodSpec):
            request = Request(
                prompts,
                self.shards,
                query_at=self.codec.query_at if self.codec else 0,
                has_heads=self.model.retaining_hidden is not None,
                model=self.model.name,
                heads=self.model.config.num_heads // self.mesh.shape[TP],
                budgets=APB_BUDGETS_OF.get(self.model.name, APB_BUDGETS),
            )
            method = method.build(request)
        elif isinstance(method, APB) and method.query_at is None:
            method = replace(method, query_at=self.codec.query_at if self.codec else 0)
        if self.virtual_shards > 1 and getattr(method, "ring_shards", 1) > 1:
            raise UserError(
                f"ulysses on {self.shards} shards exchanges heads within groups of devices, which virtual shards lack; "
                "nearest legal choice: --method ring"
            )
        if self.model.retaining_hidden is None and isinstance(method, APB) and method.passing_tokens:
            method = replace(method, scorer="query")
            notes.append("no retaining heads: keys are scored by the query's own attention (training-free)")
        reason = method.why_not(prompts, self.shards)
        if reason is not None:
            return Full(), (f"{method.name} falls back to full attention: {reason}",)
        return method, tuple(notes)

    def prefill(self, prompts: list[Prompt]) -> Session:
        """Run the documents through all layers; the returned session answers from their KV cache."""
        if not prompts:
            raise UserError("an empty list of documents; give at least 1")
        self.check_method(len(prompts))
        self.check_lengths(prompts)
        method, notes = self.choose(prompts)
        layout = method.layout(prompts, self.shards)
        config, programs = self.model.config, self.programs
        batch = len(prompts)

        def flat(rows: np.ndarray) -> jax.Array:
            return programs.place(rows.reshape(batch, -1), P(None, SP))

        host = Lengths.of(layout, np.asarray([len(p.query) for p in prompts], np.int32))
        lengths = programs.place(host, jax.tree.map(lambda _: P(), host))
        groups = layer_groups(config.num_layers)
        size = config.num_layers // groups
        rows = layout.shards * layout.kept_capacity
        cache = programs.zeros(DocumentCache, batch, rows, self.model.dtype)
        tokens, positions = flat(layout.tokens), flat(layout.positions)
        starts = [programs.place(np.int32(g * size), P()) for g in range(groups)]
        compiled_before = programs.compile_s
        started = time.perf_counter()
        x = programs.embed(self.state, tokens)
        for group in range(groups):
            self.progress("prefill", group * size, config.num_layers)
            x, cache = programs.prefill(method, size, self.state, x, positions, lengths, cache, starts[group])
            jax.block_until_ready(x)
        jax.block_until_ready(cache)
        compile_s = programs.compile_s - compiled_before
        prefill_s = time.perf_counter() - started - compile_s
        self.progress("prefill", config.num_layers, config.num_layers)
        return Session(self, method, layout, prompts, lengths, cache, prefill_s, compile_s, notes)

    def check_lengths(self, prompts: list[Prompt]) -> None:
        """Refuse what the model's positions or vocabulary cannot hold."""
        config = self.model.config
        for prompt in prompts:
            total = len(prompt.document) + len(prompt.query)
            if total > config.max_positions:
                raise UserError(
                    f"document and query have {total} tokens, {self.model.name} has {config.max_positions} positions; "
                    f"shorten the document to {config.max_positions - len(prompt.query)} tokens "
                    "(--seq keeps start and end)"
                )
            for name, ids in (("document", prompt.document), ("query", prompt.query)):
                if ids.min() < 0 or ids.max() >= config.vocab_size:
                    bad = int(ids.min() if ids.min() < 0 else ids.max())
                    raise UserError(f"the {name} has token id {bad}; ids lie in 0..{config.vocab_size - 1}")


@dataclass
class Session:
    """Documents that are on the devices; answers as often as asked."""

    engine: Engine
    method: AttentionMethod
    layout: Layout
    prompts: list[Prompt]
    lengths: Lengths
    cache: DocumentCache
    prefill_s: float
    compile_s: float
    notes: tuple[str, ...]

    def _query(
        self, queries: list[np.ndarray], new_tokens: int, all_logits: bool
    ) -> tuple[jax.Array, TailCache, Lengths]:
        """Run query rows over the cache with room for ``new_tokens`` more: (logits, tail, lengths)."""
        engine, programs = self.engine, self.engine.programs
        rows = bucket(max(len(q) for q in queries))
        slots = rows + bucket(new_tokens)
        ids = np.zeros((len(queries), rows), np.int32)
        for b, query in enumerate(queries):
            ids[b, : len(query)] = query
        counts = programs.place(np.asarray([len(q) for q in queries], np.int32), P())
        lengths = replace(self.lengths, query_tokens=counts, segments=())
        tail = programs.zeros(TailCache, len(queries), slots, engine.model.dtype)
        logits, tail = programs.query(
            self.method,
            engine.state,
            programs.place(ids, P()),
            lengths,
            self.cache,
            tail,
            all_logits=all_logits,
            bottom_right=engine.bottom_right_query,
        )
        return logits, tail, lengths

    def logits(self, continuation: Sequence[Sequence[int]] | None = None) -> list[np.ndarray]:
        """Logits float32 [query + continuation tokens, V] of each request with a given answer (teacher forcing)."""
        given = continuation if continuation is not None else [[] for _ in self.prompts]
        queries = [np.concatenate([p.query, np.asarray(c, np.int32)]) for p, c in zip(self.prompts, given, strict=True)]
        logits, _, _ = self._query(queries, 1, all_logits=True)
        host = np.asarray(logits)
        return [host[b, : len(q)] for b, q in enumerate(queries)]

    def recovered_mass(self) -> RecoveredMass | None:
        """How much of full attention's mass the method's prefill saw; None where that is not defined.

        Runs the prefill once more, with twice the attention; sampled rows of all requests and shards together.
        """
        engine, programs, layout = self.engine, self.engine.programs, self.layout
        if why_not(self.method, engine.model.config, engine.shards) is not None:
            return None
        index, real = sample_rows(layout, engine.model.config.head_dim)
        batch = len(self.prompts)
        tokens, positions, rows = (
            programs.place(np.ascontiguousarray(a.reshape(batch, -1)), P(None, SP))
            for a in (layout.tokens, layout.positions, index)
        )
        shares = programs.recovered(self.method, engine.state, tokens, positions, self.lengths, rows)
        host = np.moveaxis(np.asarray(shares), 2, 1)[:, :, real.reshape(batch, -1)]
        return RecoveredMass(np.minimum(host, 1.0))

    def generate(
        self,
        max_new_tokens: int = 32,
        *,
        sampler: Sampler = Sampler(),  # noqa: B008 - frozen
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        logits: bool = False,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[Answer]:
        """Answer every request; see ``Engine.generate``."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        engine, programs = self.engine, self.engine.programs
        config = engine.model.config
        longest = max(len(p.document) + len(p.query) for p in self.prompts)
        if longest + max_new_tokens > config.max_positions:
            raise UserError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed {engine.model.name}'s "
                f"{config.max_positions} positions; ask for at most {max(0, config.max_positions - longest)}"
            )
        compiled_before = programs.compile_s
        batch = len(self.prompts)
        started = time.perf_counter()
        engine.progress("query", 0, 1)
        rows, tail, lengths = self._query([p.query for p in self.prompts], max_new_tokens, all_logits=logits)
        host_rows = np.asarray(rows)
        query_compile = programs.compile_s - compiled_before
        query_s = time.perf_counter() - started - query_compile
        last = [host_rows[b, len(p.query) - 1] if logits else host_rows[b, 0] for b, p in enumerate(self.prompts)]

        stops = engine.stop_ids if stop_ids is None else tuple(stop_ids)
        if len(stops) > STOP_IDS:
            raise UserError(f"{len(stops)} stop ids; at most {STOP_IDS}")
        key = jax.random.key(seed)
        key, draw = jax.random.split(key)
        first = np.asarray(sampler(jnp.asarray(np.stack(last)), draw))
        tokens: list[list[int]] = [[] for _ in range(batch)]
        done = np.isin(first, np.asarray(stops, np.int32))
        self._collect(np.where(done, -1, first)[:, None], tokens, max_new_tokens, on_tokens)

        started = time.perf_counter()
        compiled_query = programs.compile_s
        stop = programs.place(np.asarray((*stops, *[-1] * (STOP_IDS - len(stops))), np.int32), P())
        state = (
            programs.place(first, P()),
            programs.place(done, P()),
            programs.place(np.asarray(jax.random.key_data(key)), P()),
        )
        step_rows: list[np.ndarray] = []
        made = 0
        while made < max_new_tokens - 1 and not np.asarray(state[1]).all():
            engine.progress("decode", made + 1, max_new_tokens)
            out, logit_rows, token, finished, key, tail = programs.decode(
                self.method,
                engine.state,
                state[0],
                programs.place(np.int32(made), P()),
                *state[1:],
                stop,
                lengths,
                self.cache,
                tail,
                steps=min(CHUNK, bucket(max_new_tokens)),
                sampler=sampler,
                with_logits=logits,
            )
            state = (token, finished, key)
            if logits:
                step_rows.append(np.asarray(logit_rows))
            self._collect(np.asarray(out), tokens, max_new_tokens, on_tokens)
            made += CHUNK
        compile_s = programs.compile_s - compiled_query
        decode_s = time.perf_counter() - started - compile_s
        engine.progress("decode", max_new_tokens, max_new_tokens)

        later = np.concatenate(step_rows) if step_rows else np.zeros((0, batch, config.vocab_size), np.float32)
        codec = engine.codec
        return [
            Answer(
                text=codec.decode(tokens[b]) if codec else "",
                tokens=tokens[b],
                method=self.method,
                document_tokens=len(prompt.document),
                query_tokens=len(prompt.query),
                prefill_s=self.prefill_s,
                query_s=query_s,
                decode_s=decode_s,
                compile_s=self.compile_s + query_compile + compile_s,
                notes=self.notes,
                query_logits=host_rows[b, : len(prompt.query)] if logits else None,
                step_logits=np.concatenate([last[b][None], later[:, b]])[: len(tokens[b])] if logits else None,
            )
            for b, prompt in enumerate(self.prompts)
        ]

    @staticmethod
    def _collect(
        new: np.ndarray, tokens: list[list[int]], limit: int, on_tokens: Callable[[int, list[int]], None] | None
    ) -> None:
        """Append new ids [B, Q] (-1: nothing) to each request's tokens and tell the listener."""
        for b, row in enumerate(new):
            fresh = [int(t) for t in row if t >= 0][: limit - len(tokens[b])]
            tokens[b].extend(fresh)
            if fresh and on_tokens:
                on_tokens(b, fresh)


def is_batch(value: Text | Sequence[Text]) -> bool:
    """Whether this is a list of requests rather than one text or one list of ids."""
    return isinstance(value, list | tuple) and bool(value) and not isinstance(value[0], int | np.integer)


def layer_groups(layers: int) -> int:
    """Into how many equal groups the layers are cut for the progress bar: the largest divisor up to 8."""
    return max(n for n in range(1, 9) if layers % n == 0)


def check_mesh(model: LoadedModel, mesh: Mesh) -> None:
    """Refuse a tensor axis that does not divide heads or FFN."""
    tp, config = mesh.shape[TP], model.config
    for name, size in (("KV heads", config.num_kv_heads), ("FFN columns", config.intermediate_size)):
        if size % tp:
            legal = [n for n in range(1, tp + 1) if config.num_kv_heads % n == 0 and config.intermediate_size % n == 0]
            raise UserError(
                f"--tp {tp} does not divide {model.name}'s {size} {name}; nearest legal choice: --tp {legal[-1]}"
            )
