"""Seconds from a question to the first token of its answer, over HTTP: document unknown, then known.

    python benchmarks/serve_first_token.py                              packaged model, 8K tokens
    python benchmarks/serve_first_token.py --model llama3.1-8b --weights random --tokens 128k

Programs are compiled by questions about another document of the same length first. Prints one JSON object: the first
question's time, the medians of the following ones', and what these are made of (query phase; the rest is tokenising,
HTTP and hand-over between threads).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import httpx
import jax

import apb_jax
from apb_jax.arguments import length as parse_length
from apb_jax.command import Parser, command
from apb_jax.report import versions
from apb_jax.serve.background import Background
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore
from apb_jax.synthetic.needle import needle_prompt
from apb_jax.weights.checkpoint import load


def first_token(http: httpx.Client, messages: list[dict[str, str]], **more: Any) -> tuple[float, dict[str, float]]:
    """(seconds to the first chunk of text, the server's own times in ms) of one streamed question."""
    body = {"messages": messages, "stream": True, "max_tokens": 8, "stop": None} | more
    started, first, times = time.perf_counter(), 0.0, {}
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - started
                times = event.get("timings", times)
    return first, times


@command("python benchmarks/serve_first_token.py")
def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights")
    parser.add_argument("--method", default="full")
    parser.add_argument("--tokens", type=parse_length, default=8192)
    parser.add_argument("--questions", type=int, default=9)
    given = parser.parse_args(argv)
    model = load(given.model, weights=given.weights)
    engine = apb_jax.Engine(model, given.method, apb_jax.make_mesh(sp=1 if given.method == "full" else None))
    made = [needle_prompt(model.tokenizer, given.tokens - 256, str(4711 + i), 0.5, i) for i in range(2)]
    documents = [one.document.replace("\n\n", "\n") for one in made]
    ask = lambda text, question: [{"role": "user", "content": f"{text}\n\n{question}"}]  # noqa: E731
    server = Background(Plan(lambda: engine, lambda _: DeviceStore(1 << 36)))
    with server, httpx.Client(base_url=server.url, timeout=3600, trust_env=False) as http:
        for _ in range(2):
            first_token(http, ask(documents[0], made[0].query))
        first, times = first_token(http, ask(documents[1], made[1].query))
        again = [first_token(http, ask(documents[1], made[1].query)) for _ in range(given.questions)]
        name = next(one["id"] for one in http.get("/v1/documents").json()["data"])
        short = [{"role": "user", "content": made[1].query}]
        by_id = [first_token(http, short, document_id=name) for _ in range(given.questions)]
    median = lambda runs: statistics.median(seconds for seconds, _ in runs)  # noqa: E731
    result = {
        "model": given.model,
        "method": given.method,
        "tokens": given.tokens,
        "first_question_s": first,
        "first_question_parts_ms": times,
        "next_questions_s": median(again),
        "next_questions_by_id_s": median(by_id),
        "share_of_first": median(again) / first,
        "query_phase_ms": statistics.median(parts["query_ms"] for _, parts in again),
        "device": f"{engine.mesh.size} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
