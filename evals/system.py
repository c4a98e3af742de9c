"""An apb_jax engine as a system under test. The only file of ``evals`` that runs the engine."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apb_jax.errors import UserError
from apb_jax.measure.plan import check_memory
from apb_jax.prefill import layer_groups
from apb_jax.prompt.pieces import begin_ids
from evals.base import Completion, Example, Scored, SystemSpec
from evals.follow import Call, follow, lead, send
from evals.tokens import Tokens, as_tokens

AUTO = "auto"
"""The method that is chosen for the longest prompt by what this machine measured."""


class EngineSystem:
    """An apb_jax engine under one method, as the benchmarks see it.

    Prompts are sent as token ids: the benchmark's own wrapper is the whole template, and what the tokenizer itself
    puts in front of a text (a begin-of-text token, or nothing) is put in front once.
    """

    def __init__(self, engine: Any, spec: SystemSpec, method: str, reason: str | None = None):
        """``reason``: why method "auto" became the engine's."""
        self._engine, self._spec, self._method, self._reason = engine, spec, method, reason
        self.tokenizer = engine.model.tokenizer
        self.tokens: Tokens = as_tokens(self.tokenizer)
        self._opening = begin_ids(self.tokenizer)

    @property
    def max_length(self) -> int:
        return self._engine.model.config.max_positions

    def count(self, text: str) -> int:
        return self.tokens.count(text)

    def generate(
        self,
        document: str,
        query: str,
        max_new_tokens: int,
        *,
        embedded_query: str | None = None,
        ignore_stop: bool = False,
    ) -> Completion:
        """Greedy answer; one that would fill the positions to the last gives up a token for begin-of-text."""
        (prompt, new_tokens) = self._request(document, query, max_new_tokens, embedded_query)
        return self._completion(self._answers([prompt], new_tokens, ignore_stop)[0])

    def prefill_alone(self, document: str, query: str) -> Completion:
        """The document through all layers, keeping no KV and answering nothing; compilation is not counted."""
        (prompt, _) = self._request(document, query, 1, None)
        method, notes, seconds = self._alone(prompt)
        return Completion("", len(prompt.document), 0, seconds, 0.0, _facts(method, notes))

    def _alone(self, prompt: Any) -> tuple[Any, Sequence[str], float]:
        """(method, notes, seconds) of a prefill without a cache."""
        from apb_jax.measure.prefill_alone import PrefillAlone

        send({"method": self._method, "alone": [prompt.document.tolist(), prompt.query.tolist()]})
        check_memory(self._engine, [prompt], 1, kept=False)
        layers = self._engine.model.config.num_layers
        work = PrefillAlone.of(self._engine, prompt, layers // layer_groups(layers))
        *_, seconds = (seconds for _, seconds, _ in work.layers())
        return work.method, self._engine.choose([prompt])[1], seconds

    def generate_batch(self, examples: Sequence[Example]) -> list[Completion]:
        """The answers of ``generate``; examples that ask for equally many tokens go to the device together."""
        requests = [self._request(e.document, e.query, e.max_new_tokens, e.embedded_query) for e in examples]
        found: dict[int, Completion] = {}
        for wanted in dict.fromkeys(new_tokens for _, new_tokens in requests):
            places = [place for place, (_, new_tokens) in enumerate(requests) if new_tokens == wanted]
            answers = self._answers([requests[place][0] for place in places], wanted)
            found |= {place: self._completion(a) for place, a in zip(places, answers, strict=True)}
        return [found[place] for place in range(len(requests))]

    def _request(self, document: str, query: str, new_tokens: int, embedded_query: str | None) -> tuple[Any, int]:
        """(prompt, tokens to be generated)."""
        document_ids, query_ids = self.open(self.tokens.encode(document)), self.tokens.encode(query)
        room = self.max_length - len(document_ids) - len(query_ids)
        if new_tokens - len(self._opening) <= room < new_tokens:
            new_tokens = room
        embedded = None if embedded_query is None else self.tokens.encode(embedded_query)
        return self._prompt(document_ids, query_ids, embedded), new_tokens

    @staticmethod
    def _completion(answer: Any) -> Completion:
        return Completion(
            text=answer.text,
            prompt_tokens=answer.document_tokens + answer.query_tokens,
            generated_tokens=len(answer.tokens),
            prefill_s=answer.prefill_s + answer.query_s,
            decode_s=answer.decode_s,
            facts=_facts(answer.method, answer.notes),
        )

    def log_probs(self, document: Sequence[int], segment: Sequence[int]) -> Scored:
        """float32 log-probability of each segment token after the document and the segment before it.

        The document (all but its last token) goes through the method's prefill; nothing of the segment is embedded.
        """
        return self.score_after(self.open(document), segment)

    def score_after(self, context: Sequence[int], continuation: Sequence[int]) -> Scored:
        """Log-probabilities of the continuation after a context of one token or more."""
        if len(context) > 1:
            return self.score_ids(context[:-1], context[-1:], continuation)
        # The engine gives no logits of document rows. A token behind its equal attends to equal values, so its logits
        # are those of the token alone; what follows is scored behind the single one.
        first = self.score_ids(context, context, continuation[:1])
        if len(continuation) == 1:
            return first
        rest = self.score_ids(context, continuation[:1], continuation[1:])
        return Scored(np.concatenate([first.log_probs, rest.log_probs]), rest.facts, first.greedy and rest.greedy)

    def answer_ids(
        self,
        prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
        max_new_tokens: int,
        *,
        embedded_query: Sequence[int] | None = None,
        ignore_stop: bool = False,
    ) -> list[Any]:
        """The engine's answers to a batch of (document, query) ids."""
        return self._answers([self._prompt(d, q, embedded_query) for d, q in prompts], max_new_tokens, ignore_stop)

    def _answers(self, asked: list[Any], max_new_tokens: int, ignore_stop: bool = False) -> list[Any]:
        from apb_jax.batching import answer_batch

        ids = [[list(map(int, part)) for part in (p.document, p.query, p.embedded_query)] for p in asked]
        given = {"prompts": ids, "new_tokens": max_new_tokens, "ignore_stop": ignore_stop}
        send({"method": self._method, "answer": given})
        check_memory(self._engine, asked, max_new_tokens)
        return answer_batch(self._engine, asked, max_new_tokens, stop_ids=() if ignore_stop else None)

    def score_ids(self, document: Sequence[int], query: Sequence[int], continuation: Sequence[int]) -> Scored:
        """Log-probabilities of the continuation; ``greedy``: whether greedy decoding would give it."""
        given = [list(map(int, ids)) for ids in (document, query, continuation)]
        send({"method": self._method, "score": given})
        prompt = self._prompt(document, query)
        check_memory(self._engine, [prompt], len(continuation))
        session = self._engine.prefill([prompt])
        (logits,) = session.logits([list(continuation[:-1])])
        logits = logits[len(query) - 1 :]
        targets = np.asarray(continuation)
        top = logits.max(axis=-1, keepdims=True)
        normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=-1))
        chosen = logits[np.arange(len(targets)), targets]
        greedy = bool((logits.argmax(axis=-1) == targets).all())
        return Scored(chosen - normaliser, _facts(session.method, session.notes), greedy)

    def _prompt(self, document: Sequence[int], query: Sequence[int], embedded: Sequence[int] | None = None) -> Any:
        ids = [None if x is None else np.asarray(x, np.int32) for x in (document, query, embedded)]
        return self._engine.prompt(*ids)

    def obey(self, call: Call) -> None:
        """A call of the first of several processes, with this one's devices."""
        if "score" in call:
            self.score_ids(*call["score"])
            return
        if "alone" in call:
            self._alone(self._prompt(*call["alone"]))
            return
        given = call["answer"]
        asked = [self._prompt(*ids) for ids in given["prompts"]]
        self._answers(asked, given["new_tokens"], given["ignore_stop"])

    def describe(self) -> dict[str, Any]:
        import jax

        engine, device = self._engine, jax.devices()[0]
        precision = engine.settings.precision
        return {
            "model": engine.model.name,
            "model_path": self._spec.model,
            "weights": self._spec.weights or "checkpoint",
            "heads": self._spec.heads or ("checkpoint" if engine.model.retaining_hidden is not None else "none"),
            "method": self._method,
            **({} if self._reason is None else {"chosen": engine.method.name, "reason": self._reason}),
            "method_options": self._spec.options.get(self._method, {}),
            "dtype": engine.model.dtype.name,
            **({"precision": dataclasses.asdict(precision)} if precision.changed else {}),
            "tokenizer": self.tokens.name,
            "begin_token_added": bool(self._opening),
            "mesh": dict(engine.mesh.shape),
            "shards": engine.shards,
            "device": f"{device.device_kind} ({device.platform})",
            "decoding": "greedy",
        }

    def open(self, ids: Sequence[int]) -> list[int]:
        """``ids`` behind what the tokenizer itself begins a text with."""
        return list(ids) if list(ids[: len(self._opening)]) == self._opening else [*self._opening, *ids]


def _facts(method: Any, notes: Sequence[str]) -> dict[str, Any]:
    """What ran for one prompt: the method with its budgets, and the engine's notes (a fallback to full)."""
    facts = {"method": method.name, **dataclasses.asdict(method)}
    return {**facts, "notes": list(notes)} if notes else facts


def connect(spec: SystemSpec) -> Callable[[str], EngineSystem]:
    """Load the model once; the returned function puts it under a method.

    Of several processes only the first one returns; the others work for it and leave with ``SystemExit`` 0.
    """
    from apb_jax.mesh import (
        SP,
        has_accelerator,
        make_mesh,
        reserve_memory,
        sequence_devices,
        simulate_devices,
        simulated_devices,
    )

    if has_accelerator():
        reserve_memory()
    else:
        devices = simulated_devices(spec.model, spec.sp, spec.tp, spec.shards)
        simulate_devices(max(1, devices // spec.joining.count))
    spec.joining.start()
    import jax

    from apb_jax.attention.registry import MethodSpec
    from apb_jax.compile_cache import use_compile_cache
    from apb_jax.engine import Engine
    from apb_jax.measure.beside import Beside
    from apb_jax.measure.choose import choose
    from apb_jax.prompt.style import PromptStyle
    from apb_jax.weights.checkpoint import load

    use_compile_cache()
    if spec.options.get(AUTO):
        raise UserError(f"method {AUTO} decides itself; drop --set {sorted(spec.options[AUTO])} or name a method")
    methods = {name: MethodSpec(name, spec.options.get(name, {})) for name in spec.methods if name != AUTO}
    sp = spec.sp or sequence_devices(max(1, len(jax.devices()) // spec.tp), spec.shards)
    mesh = make_mesh(sp, spec.tp)
    model = load(spec.model, weights=spec.weights, heads=spec.heads, dtype=spec.dtype)
    if model.tokenizer is None:
        raise UserError(f"model {spec.model!r} has no tokenizer; benchmarks need one")
    style, precision = PromptStyle("none"), spec.precision
    engines = Beside(Engine(model, "full", mesh, prompt_style=style, shards=spec.shards, precision=precision))

    def system(name: str) -> EngineSystem:
        send({"method": name})
        if name != AUTO:
            return EngineSystem(engines.of(methods[name]), spec, name)
        length = spec.length or model.config.max_positions
        found = choose(model, length, mesh.shape[SP], tp=spec.tp, precision=precision)
        chosen = MethodSpec(found.method)
        shards = chosen.shards_on(found.devices, spec.shards if found.devices == mesh.shape[SP] else None)
        place = mesh if found.devices == mesh.shape[SP] else make_mesh(found.devices, spec.tp)
        engine = Engine(
            model, chosen, place, prompt_style=style, shards=shards, precision=precision, beside=engines.first
        )
        return EngineSystem(engine, spec, name, found.reason)

    if jax.process_index() > 0:
        made: dict[str, EngineSystem] = {}

        def obey(call: Call) -> None:
            name = call["method"]
            if name not in made:
                made[name] = system(name)
            elif len(call) > 1:
                made[name].obey(call)

        follow(obey)
        raise SystemExit(0)
    lead()
    return system
