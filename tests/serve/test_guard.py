"""What a request may not do: be too large, come from another page, break the server. And what is told of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.books import ask

from apb_jax.serve.guard import LOOPBACK, Gate
from apb_jax.serve.stops import StopStrings

EXAMPLES = int(os.environ.get("APB_FUZZ", "150"))
"""Requests of each fuzz test."""
SETTINGS = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(st.characters(), max_size=200)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts | anything}
    ),
    max_size=4,
)
fields = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 3) | anything},
    optional={
        name: anything | good
        for name, good in {
            "messages": messages,
            "prompt": texts | st.lists(st.integers(-2, 5000), max_size=80),
            "question": texts,
            "text": texts,
            "stop": texts | st.lists(texts, max_size=3),
            "temperature": st.floats(0, 2),
            "top_p": st.floats(0, 1),
            "seed": st.integers(),
            "logprobs": st.booleans() | st.integers(0, 5),
            "top_logprobs": st.integers(0, 20),
            "stream": st.booleans(),
            "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
            "document_id": st.just("doc-none"),
            "prefill": st.just(False),
            "name": texts,
        }.items()
    },
)
paths = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/documents", "/v1/documents/doc-x/questions"])


@SETTINGS
@given(path=paths, body=fields)
def test_a_fuzzed_body_is_answered_or_refused(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    body = body | {"prefill": False} if path == "/v1/documents" else body
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    reply = http.post(path, content=raw, headers={"content-type": "application/json"})
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


@SETTINGS
@given(raw=st.binary(max_size=300), path=paths, kind=st.sampled_from(["application/json", "multipart/form-data", "x"]))
def test_fuzzed_bytes_are_refused(http: httpx.Client, raw: bytes, path: str, kind: str) -> None:
    reply = http.post(path, content=raw, headers={"content-type": kind})
    assert 400 <= reply.status_code < 500


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"temperature": NaN}',
        b'{"messages": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff",
        b"",
        b"null",
    ],
)
def test_hostile_json_is_refused_in_words(http: httpx.Client, raw: bytes) -> None:
    reply = http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_large_body_is_refused_announced_or_not(another: Callable[..., Any]) -> None:
    server = another(gate=Gate(largest_body=1000))
    head = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        fits = http.post("/v1/documents", json={"text": "x" * 900, "prefill": False})
        announced = http.post("/v1/documents", json={"text": "x" * 1000})
        chunks = http.post("/v1/documents", content=iter([b"x" * 600, b"x" * 600]), headers=head)
        upload = http.post("/v1/documents", files={"file": ("x", b"x" * 1000)})
    assert fits.status_code == 201
    assert [reply.status_code for reply in (announced, chunks, upload)] == [413] * 3


def test_pages_of_others_may_not_ask_unless_they_are_named(another: Callable[..., Any], http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"origin": str(http.base_url).rstrip("/")}).status_code == 200
    assert "access-control-allow-origin" not in http.get("/v1/models").headers
    server = another(gate=Gate(hosts=LOOPBACK, origins=("https://good.example",)))
    good = httpx.get(f"{server.url}/v1/models", headers={"origin": "https://good.example"}, trust_env=False)
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    rebound = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}, trust_env=False)
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "wrong_host")


def test_unknown_paths_and_methods_have_the_form_too(http: httpx.Client) -> None:
    for reply, status in ((http.get("/v1/nothing"), 404), (http.get("/v1/completions"), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_metrics_count(http: httpx.Client) -> None:
    for _ in range(2):
        http.post("/v1/chat/completions", json={"messages": ask("a", "b"), "max_tokens": 1})
    text = http.get("/metrics").text
    for line in (
        'apb_requests_total{route="/v1/chat/completions",status="200"}',
        "apb_queue 0.0",
        "apb_prefill_seconds_total",
        "apb_prefill_tokens_total",
        "apb_decode_tokens_total",
        'apb_session_lookups_total{result="hit"}',
        'apb_session_bytes{where="device"}',
    ):
        assert line in text


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_a_stop_string_is_found_however_the_text_arrives(text: str, stops: list[str], cuts: list[int]) -> None:
    """As if one had waited, character by character, for the first stop string to be complete."""
    ends = [(end, end - len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop)]
    expected = text[: min(ends)[1]] if ends else text
    matcher, shown, rest = StopStrings(tuple(stops)), "", text
    for cut in cuts:
        shown += matcher.push(rest[:cut])
        assert expected.startswith(shown)
        rest = rest[cut:]
    assert shown + matcher.end() == expected
    assert matcher.found == bool(ends)
