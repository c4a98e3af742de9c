"""The receipt of a question: both answers are the engines' own, and an exact method has nothing to compare."""

from __future__ import annotations

from typing import Any

import httpx
from serve.books import book

from apb_jax.serve.background import Background
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore

QUESTION = "Who saw the river?"


def test_a_receipt_compares_with_exact_attention(engine: Any) -> None:
    approximate, text = engine.with_method("streaming"), book(95)
    server = Background(Plan(lambda: approximate, lambda _: DeviceStore(1 << 28)))
    with server, httpx.Client(base_url=server.url, timeout=300, trust_env=False) as http:
        name = http.post("/v1/documents", json={"text": text}).json()["id"]
        told = http.post(f"/v1/documents/{name}/receipt", json={"question": QUESTION, "max_tokens": 6}).json()
    assert (told["method"], told["against"]) == ("streaming", "full")
    assert told["answer"] == approximate.generate(text, QUESTION, 6).text
    assert told["exact_answer"] == engine.generate(text, QUESTION, 6).text
    assert told["kl_max"] >= told["kl_mean"] > 0
    assert 0 <= told["top1_agreement"] <= 1


def test_an_exact_method_has_nothing_to_compare(http: httpx.Client) -> None:
    name = http.post("/v1/documents", json={"text": book(96), "prefill": False}).json()["id"]
    reply = http.post(f"/v1/documents/{name}/receipt", json={"question": QUESTION})
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "exact")
