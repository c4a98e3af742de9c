"""apb_jax as a model of lm-evaluation-harness, registered under the name ``apb_jax``.

    python -m evals lm_eval --model apb_jax --model_args model=tiny,method=apb,sp=8 --tasks ruler ...

is ``lm_eval`` with this model known (the harness itself has no way to find models of other packages).

A request brings one string; methods that treat document and query apart need two. ``split=auto`` cuts before RULER's
question or before the last paragraph or line; ``split=64`` takes the last 64 tokens as the query. For exact methods the
cut changes nothing. Log-likelihoods: the context goes through the method's prefill, the continuation is scored with
exact causal attention over what the method kept, and is never embedded in an anchor. ``loglikelihood_rolling`` scores a
window's tokens after the window's context in the same way. Windows, begin tokens and truncation are those of the
harness's own ``hf`` model, so that full attention gives its figures.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apb_jax.errors import UserError
from apb_jax.install import install_hint
from apb_jax.precision import Precision
from evals.base import EvalError, Scored, SystemSpec
from evals.ruler.prompt import split_prompt
from evals.system import EngineSystem, connect

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise EvalError(f"the adapter needs lm-evaluation-harness: {install_hint('evals')}") from error

log = logging.getLogger(__name__)

LAST_TOKENS = 16
"""Query tokens of a string without any line break."""


@dataclass(frozen=True)
class ModelArgs:
    """What ``--model_args`` and the harness say about the model.

    Attributes:
      model: model name or folder; also accepted as ``pretrained``.
      method: attention method; keywords that are no field are its options (``anchor_tokens=1024``).
      split: ``auto`` or a number of tokens, see the module.
      max_length: most tokens of prompt and answer (default: the model's positions).
      batch_size: requests answered together; budgets that follow the prompt's length are then the shortest one's.
    """

    model: str
    method: str = "apb"
    sp: int | None = None
    tp: int = 1
    weights: str | None = None
    heads: str | None = None
    dtype: str | None = None
    precision: str | None = None
    kv_dtype: str | None = None
    split: str | int = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    batch_size: int | str = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split != "auto" and not (isinstance(self.split, int) and self.split > 0):
            raise UserError(f"split={self.split!r}: it must be 'auto' or a positive number of tokens")
        if not str(self.batch_size).isdigit() or int(self.batch_size) < 1:
            raise UserError(f"batch_size={self.batch_size!r}: it must be a positive number")

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> "ModelArgs":
        """Sort the harness's keywords; it always passes ``device`` (JAX chooses its own) and ``max_batch_size``."""
        given = {name: value for name, value in keywords.items() if name not in ("device", "max_batch_size")}
        model = given.pop("model", None) or given.pop("pretrained", None)
        if model is None:
            raise UserError("model_args name no model: give model=NAME")
        given.pop("pretrained", None)
        known = {f.name for f in fields(cls)} - {"options"}
        options = {name: given.pop(name) for name in list(given) if name not in known}
        return cls(str(model), options=options, **given)

    def spec(self) -> SystemSpec:
        return SystemSpec(
            self.model,
            (self.method,),
            {self.method: dict(self.options)},
            self.weights,
            self.heads,
            self.dtype,
            self.sp,
            self.tp,
            precision=Precision.of(self.precision, kv=self.kv_dtype),
        )


@register_model("apb_jax")
class ApbJaxLM(TemplateLM):
    """An apb_jax engine behind the harness's interface; its keywords are ``--model_args``: see ``ModelArgs``."""

    def __init__(self, *, system: EngineSystem | None = None, **keywords: Any) -> None:
        super().__init__()
        args = ModelArgs.of(keywords)
        self.system = system if system is not None else connect(args.spec())(args.method)
        self.tokenizer = self.system.tokenizer
        self.max_length = min(args.max_length or self.system.max_length, self.system.max_length)
        self._split, self._max_gen_toks, self._batch_size = args.split, args.max_gen_toks, int(args.batch_size)

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return self.system.tokens.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids behind what the tokenizer itself begins a text with, unless ``add_special_tokens`` is False."""
        ids = list(self.system.tokens.encode(string))
        return ids if add_special_tokens is False else self.system.open(ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's chat template as text; without a generation prompt the last message goes on."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer {self.system.tokens.name} has no chat template; leave --apply_chat_template out"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def split_ids(self, context: str, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """(document, query) ids of a prompt of two tokens or more; both hold at least one."""
        ids = list(ids)
        if isinstance(self._split, int):
            cut = len(ids) - self._split
        else:
            text, _ = _split_text(context)
            cut = len(self.tok_encode(text)) if text else len(ids) - LAST_TOKENS
        cut = min(max(1, cut), len(ids) - 1)
        return ids[:cut], ids[cut:]

    # -- requests -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop string; prompts that are too long lose their start."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(index)
        answers: list[str | None] = [None] * len(requests)
        for indices in groups.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], self._max_gen_toks)
            if options.get("do_sample") or options.get("temperature", 0) not in (0, 0.0):
                raise UserError(f"generation_kwargs {requests[indices[0]].args[1]}: this adapter decodes greedily")
            until = options["until"] if isinstance(options["until"], list) else [options["until"]]
            limit = int(options["max_gen_toks"])
            ordered = sorted(indices, key=lambda i: -len(requests[i].args[0]))
            for start in range(0, len(ordered), self._batch_size):
                batch = ordered[start : start + self._batch_size]
                prompts = [self._fitting(requests[i].args[0], limit) for i in batch]
                for index, answer in zip(batch, self.system.answer_ids(prompts, limit), strict=True):
                    text = _cut(answer.text, until)
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [answer for answer in answers if answer is not None]

    def _fitting(self, context: str, new_tokens: int) -> tuple[list[int], list[int]]:
        ids = self.tok_encode(context)
        if len(ids) < 2:
            raise UserError(f"a prompt of {len(ids)} tokens, {context!r}: it needs a document and a query, 2 tokens")
        document, query = self.split_ids(context, ids)
        surplus = len(document) + len(query) - (self.max_length - new_tokens)
        if surplus > 0:
            if surplus >= len(document):
                raise UserError(
                    f"a query of {len(query)} tokens and {new_tokens} new ones exceed max_length {self.max_length}"
                )
            log.warning("prompt too long: its first %d tokens are left out (max_length %d)", surplus, self.max_length)
            document = document[surplus:]
        return document, query

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for args, context, continuation in requests:
            # The continuation's last token is scored and not read, so it needs no position.
            surplus = len(context) + len(continuation) - 1 - self.max_length
            if surplus >= len(context):
                raise UserError(f"a continuation of {len(continuation)} tokens exceeds max_length {self.max_length}")
            if surplus > 0:
                log.warning("context too long: its first %d tokens are left out", surplus)
            scored = self._scored(args[0], context, max(0, surplus), continuation)
            result = (float(scored.log_probs.sum()), bool(scored.greedy))
            self.cache_hook.add_partial("loglikelihood", args, result)
            results.append(result)
        return results

    def _scored(self, text: str, context: list[int], left_out: int, continuation: list[int]) -> Scored:
        """The continuation after the context (``text`` as ids) without its first ``left_out`` tokens."""
        if len(context) - left_out < 2:
            return self.system.score_after(context[left_out:], continuation)
        document, query = self.split_ids(text, context)
        if left_out >= len(document):
            return self.system.score_after(context[left_out:], continuation)
        return self.system.score_ids(document[left_out:], query, continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Total log-probability of each text; every token is scored once, in windows of ``max_length``."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                total += float(self.system.score_after(context, continuation).log_probs.sum())
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals


def _split_text(context: str) -> tuple[str, str]:
    """(document, query) of a prompt in one string; the document is empty where nothing separates them."""
    try:
        return split_prompt(context)
    except EvalError:
        body = context.rstrip()
        for mark in ("\n\n", "\n"):
            cut = body.rfind(mark)
            if cut > 0:
                return context[: cut + len(mark)], context[cut + len(mark) :]
        return "", context


def _cut(text: str, until: Sequence[str]) -> str:
    places = [text.find(stop) for stop in until if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def main(argv: Sequence[str]) -> int:
    """The harness's own command line with this model and this project's tasks known."""
    from lm_eval.__main__ import cli_evaluate

    argv = list(argv)
    if "--include_path" not in argv:
        argv += ["--include_path", str(Path(__file__).parent / "lm_eval_tasks")]
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()
    return 0
