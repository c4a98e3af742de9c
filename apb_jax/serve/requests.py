"""What a client asks for: the bodies of OpenAI's API as frozen dataclasses, with OpenAI's rules."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from typing import Any

from apb_jax.sampling import LEAST_TEMPERATURE, Sampler
from apb_jax.serve.fields import Fields, clean_text
from apb_jax.serve.refusal import not_found, wrong

MOST_STOPS = 16
MOST_LOGPROBS = 20
"""OpenAI's bound of ``top_logprobs``."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that would change the answer and are not served: any value but these is refused rather than ignored."""


@dataclass(frozen=True)
class Defaults:
    """What the server takes where a request leaves it open."""

    new_tokens: int = 512
    temperature: float = 0.0


@dataclass(frozen=True)
class Options:
    """How an answer is wanted."""

    max_tokens: int | None = None
    """None: the server's default, as far as the model has positions."""
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """How many alternatives to report for each token; None: no log probabilities at all."""
    stream: bool = False
    include_usage: bool = False
    return_progress: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """``POST /v1/chat/completions``."""

    instructions: str
    """System and developer messages, joined."""
    turns: tuple[tuple[str, str | None], ...]
    """(the user's text, the answer to it); the last one waits for its answer."""
    document_id: str | None
    options: Options


@dataclass(frozen=True)
class CompletionRequest:
    """``POST /v1/completions``."""

    prompt: str | tuple[int, ...]
    options: Options


def parse_options(fields: Fields, defaults: Defaults) -> Options:
    """The fields that all three ways to ask have in common, but for ``logprobs``."""
    for name, values in NEUTRAL.items():
        if fields.given(name) and fields.body[name] not in values:
            raise wrong(name, f"{name} is not served but as {values[0]!r}")
    limits = {fields.whole(name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise wrong("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1, open_low=True)
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    streaming = fields.flag("stream")
    extra = fields.inner("stream_options")
    if extra.body and not streaming:
        raise wrong("stream_options", "stream_options goes with stream: true")
    return Options(
        max_tokens=limits.pop() if limits else None,
        sampler=_sampler(defaults.temperature if temperature is None else temperature, 1.0 if top_p is None else top_p),
        seed=secrets.randbelow(2**31) if seed is None else seed % 2**31,
        stop=parse_stop(fields.body.get("stop")),
        stream=streaming,
        include_usage=extra.flag("include_usage"),
        return_progress=fields.flag("return_progress"),
    )


def _sampler(temperature: float, top_p: float) -> Sampler:
    """A temperature that float32 cannot divide by picks the best token, as its limit does."""
    return Sampler(temperature if temperature >= LEAST_TEMPERATURE else 0.0, top_p)


def parse_stop(value: Any) -> tuple[str, ...]:
    """One stop string or a list of them."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise wrong("stop", f"stop must be a string or a list of at most {MOST_STOPS}, none of them empty")
    return tuple(dict.fromkeys(clean_text(stop, "stop") for stop in stops))


def check_model(fields: Fields, served: str) -> None:
    """Refuse another model's name; none at all means the one that is served."""
    name = fields.text("model")
    if name is not None and name != served:
        raise not_found(f"this server has one model, {served!r}; see /v1/models", "model", "model_not_found")


def parse_chat(fields: Fields, served: str, defaults: Defaults) -> ChatRequest:
    """The body of ``POST /v1/chat/completions``."""
    check_model(fields, served)
    options = parse_options(fields, defaults)
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    asked = fields.flag("logprobs")
    if top is not None and not asked:
        raise wrong("top_logprobs", "top_logprobs goes with logprobs: true")
    instructions, turns = parse_messages(fields.body.get("messages"))
    chosen = replace(options, logprobs=(top or 0) if asked else None)
    return ChatRequest(instructions, turns, fields.text("document_id"), chosen)


def parse_completion(fields: Fields, served: str, defaults: Defaults) -> CompletionRequest:
    """The body of ``POST /v1/completions``: one prompt, text or token ids."""
    check_model(fields, served)
    options = parse_options(fields, defaults)
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    prompt = fields.body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    chosen = replace(options, logprobs=logprobs)
    if isinstance(prompt, str) and prompt:
        return CompletionRequest(clean_text(prompt, "prompt"), chosen)
    if isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < 2**31 for i in prompt):
        return CompletionRequest(tuple(prompt), chosen)
    raise wrong("prompt", "prompt must be one text or one list of token ids, and not empty")


def parse_question(fields: Fields, defaults: Defaults) -> ChatRequest:
    """The body of ``POST /v1/documents/{id}/questions``."""
    question = fields.needed_text("question")
    return ChatRequest("", ((question, None),), None, parse_options(fields, defaults))


def parse_messages(value: Any) -> tuple[str, tuple[tuple[str, str | None], ...]]:
    """(instructions, turns) of a conversation: instructions anywhere, then user and assistant in turn, user last."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", "messages must be a list of at least one message")
    instructions: list[str] = []
    turns: list[tuple[str, str | None]] = []
    for index, message in enumerate(value):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            raise wrong("messages", f"{place} must be an object with role and content")
        role, text = message.get("role"), message_text(message.get("content"), place)
        if role in ("system", "developer"):
            instructions.append(text)
        elif role == "user":
            if turns and turns[-1][1] is None:
                turns[-1] = (f"{turns[-1][0]}\n\n{text}", None)
            else:
                turns.append((text, None))
        elif role == "assistant":
            if not turns or turns[-1][1] is not None:
                raise wrong("messages", f"{place} is an assistant's and does not follow a user's")
            turns[-1] = (turns[-1][0], text)
        else:
            raise wrong("messages", f"{place} has a role that is not served; use system, developer, user or assistant")
    if not turns or turns[-1][1] is not None:
        raise wrong("messages", "the last message must be a user's")
    if not turns[-1][0].strip():
        raise wrong("messages", "the last message is empty; it needs at least one word")
    return "\n\n".join(filter(None, instructions)), tuple(turns)


def message_text(content: Any, place: str) -> str:
    """The text of a message: a string, or a list of text parts."""
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong("messages", f"{place} has content that is not text; give a string or parts of type text")
        texts.append(clean_text(part["text"], place))
    return "".join(texts)
