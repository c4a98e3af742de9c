"""The official client works unchanged: answers, streams, usage, stops, seeds, log probabilities, errors by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from serve.books import ask, book

from apb_jax.serve.guard import Gate

TEXT = book(1)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as made:
        yield made


def chat(client: openai.OpenAI, question: str = "What did the day see?", **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=ask(TEXT, question), **({"max_tokens": 12} | options))


def test_a_chat_is_the_engines_own_answer(client: openai.OpenAI, engine: Any) -> None:
    whole = chat(client)
    alone = engine.generate(TEXT, "What did the day see?", 12)
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert choice.finish_reason == alone.finish_reason
    assert whole.usage.prompt_tokens == alone.document_tokens + alone.query_tokens
    assert whole.usage.completion_tokens == len(alone.tokens)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=40)
    chunks = list(chat(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_is_without_a_choice(client: openai.OpenAI) -> None:
    assert all(len(chunk.choices) == 1 for chunk in chat(client, stream=True))


def test_a_stop_string_ends_the_answer_across_token_borders(client: openai.OpenAI) -> None:
    """Cut anywhere in the text, also inside a token and over two of them; whole and streamed."""
    say = partial(
        client.chat.completions.create,
        model="tiny",
        messages=[{"role": "user", "content": "Hello there"}],
        max_tokens=30,
    )
    free = say().choices[0].message.content
    assert len(free) >= 40
    for start, length in ((1, 1), (7, 9), (len(free) - 12, 12)):
        stop = free[start : start + length]
        expected = free[: free.index(stop)]
        stopped = say(stop=[stop, "never there"])
        assert stopped.choices[0].message.content == expected
        assert stopped.choices[0].finish_reason == "stop"
        chunks = say(stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_seed_repeats_and_another_one_differs(client: openai.OpenAI) -> None:
    say = lambda seed: chat(client, seed=seed, temperature=1.8).choices[0].message.content  # noqa: E731
    assert say(7) == say(7)
    assert len({say(seed) for seed in (1, 2, 3, -4)}) > 1


def test_log_probabilities_are_of_the_tokens_shown(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3)
    tokens = whole.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == whole.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-9
    streamed = [
        token.token
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == [token.token for token in tokens]
    stop = whole.choices[0].message.content[3:5]
    cut = chat(client, logprobs=True, stop=stop)
    shown = "".join(token.token for token in cut.choices[0].logprobs.content)
    assert shown.startswith(cut.choices[0].message.content)
    assert len(cut.choices[0].logprobs.content) < len(tokens)


def test_completions_continue_the_text(client: openai.OpenAI, engine: Any) -> None:
    prompt = f"{TEXT}\n\nThe harbour of day"
    made = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, logprobs=2)
    codec = engine.codec
    ids = [codec.tokenizer.bos_token_id, *codec.encode(f"{TEXT}\n\n"), *codec.encode("The harbour of day")]
    alone = engine.generate(ids[:-3], ids[-3:], 6)
    assert made.choices[0].text == alone.text
    assert "".join(made.choices[0].logprobs.tokens) == alone.text
    assert all(len(top) == 2 for top in made.choices[0].logprobs.top_logprobs)
    by_ids = client.completions.create(model="tiny", prompt=[int(i) for i in ids], max_tokens=6)
    assert by_ids.choices[0].text == alone.text
    streamed = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == alone.text


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.max_model_len == 32768
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"extra_body": {"tools": [{"type": "function"}]}}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": []}, "messages"),
    ],
)
def test_impossible_values_are_bad_requests(client: openai.OpenAI, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": ask("a", "b")} | options))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_unknown_fields_are_ignored(client: openai.OpenAI) -> None:
    assert chat(client, extra_body={"min_p": 0.1, "user": "me"}).choices[0].finish_reason


def test_what_is_too_long_is_refused_with_the_numbers_and_without_the_text(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, max_tokens=32768)
    assert caught.value.code == "context_length_exceeded"
    assert "32768 positions" in caught.value.message
    assert "harbour" not in caught.value.message


def test_another_models_name_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=ask("a", "b"))
    assert caught.value.code == "model_not_found"


def test_a_wrong_key_is_an_authentication_error(another: Callable[..., Any]) -> None:
    server = another(gate=Gate(keys=(b"right", b"also right")))
    make = lambda key: openai.OpenAI(  # noqa: E731
        base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False)
    )
    for key in ("right", "also right"):
        with make(key) as good:
            assert good.models.list().data
    with make("wrong") as bad, pytest.raises(openai.AuthenticationError) as caught:
        bad.models.list()
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 401
