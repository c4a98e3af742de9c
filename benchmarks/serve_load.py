"""Many clients, few documents, some that hang up: what the server takes, and that nothing is left behind.

    python benchmarks/serve_load.py                      50 clients x 200 requests over 10 documents, packaged model
    python benchmarks/serve_load.py --clients 8 --requests 10 --documents 3

Prints one JSON object: completed and left requests, errors, seconds to the first token and to the end (p50, p99), and
the devices' arrays before and after. Exit status 1 where there was an error or something was left behind.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import jax
import numpy as np

import apb_jax
from apb_jax.command import Parser, command
from apb_jax.report import versions
from apb_jax.serve.background import Background
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore
from apb_jax.serve.worker import Limits
from apb_jax.synthetic.needle import needle_prompt
from apb_jax.weights.checkpoint import load


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    clients: int = 50
    requests: int = 200
    documents: int = 10
    tokens: int = 512
    """Of each document."""
    new_tokens: int = 16
    hang_up: float = 0.1
    """Share of requests whose client goes away, at a random moment of its stream."""
    seed: int = 0


@dataclass
class Tally:
    """What the clients saw."""

    errors: list[str] = field(default_factory=list)
    left: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    cached: int = 0


async def client(url: str, load: Load, prompts: list[tuple[str, str]], number: int, tally: Tally) -> None:
    """One client: request after request, a third of them not streamed."""
    rng = random.Random(load.seed * 1_000_003 + number)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:
        for _ in range(load.requests):
            document, question = rng.choice(prompts)
            body = {
                "messages": [{"role": "user", "content": f"{document}\n\n{question}"}],
                "max_tokens": load.new_tokens,
                "stream": rng.random() < 0.67,
                "stream_options": None,
            }
            if body["stream"]:
                body["stream_options"] = {"include_usage": True}
            patience = rng.random() * 0.5 if rng.random() < load.hang_up else None
            try:
                async with asyncio.timeout(patience):
                    await one(http, body, tally)
            except TimeoutError:
                tally.left += 1
            except httpx.HTTPError as error:
                tally.errors.append(repr(error))


async def one(http: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> None:
    """One request to its end."""
    started = time.perf_counter()
    first = 0.0
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line async for line in stamped(reply)]
    ended = time.perf_counter() - started
    if reply.status_code != 200:
        tally.errors.append(f"{reply.status_code} {lines[0][1][:200] if lines else ''}")
        return
    if body["stream"]:
        events = [(at, json.loads(line[6:])) for at, line in lines if line.startswith("data: {")]
        texts = [at for at, event in events if event.get("choices") and event["choices"][0]["delta"].get("content")]
        if any("error" in event for _, event in events) or lines[-2][1] != "data: [DONE]":
            tally.errors.append(f"a stream ended with {lines[-1][1][:200]}")
            return
        first = texts[0] - started if texts else ended
        usage = events[-1][1]["usage"]
    else:
        usage = json.loads(lines[0][1])["usage"]
    if first:
        tally.first_s.append(first)
    tally.whole_s.append(ended)
    tally.cached += usage["prompt_tokens_details"]["cached_tokens"] > 0


async def stamped(reply: httpx.Response) -> Any:
    """(time, line) of a reply as it comes."""
    async for line in reply.aiter_lines():
        yield time.perf_counter(), line


def device_arrays() -> tuple[int, int]:
    """(arrays, bytes) on the devices."""
    gc.collect()
    live = jax.live_arrays()
    return len(live), sum(array.nbytes for array in live)


def run_load(engine: apb_jax.Engine, load: Load) -> dict[str, Any]:
    """Serve, ask, and look what is left."""
    tally = Tally()
    prompts = []
    for index in range(load.documents):
        made = needle_prompt(engine.model.tokenizer, load.tokens, str(100_000 + index), 0.5, load.seed + index)
        prompts.append((made.document.replace("\n\n", "\n"), made.query))
    _ = engine.state  # the weights are there before and after
    before = device_arrays()

    async def everybody() -> None:
        await asyncio.gather(*(client(server.url, load, prompts, i, tally) for i in range(load.clients)))

    plan = Plan(lambda: engine, lambda _: DeviceStore(1 << 30), Limits(queue=2 * load.clients))
    with Background(plan) as server:
        started = time.perf_counter()
        asyncio.run(everybody())
        seconds = time.perf_counter() - started
        worker, store = server.service.loaded.worker, server.service.loaded.store
        patience = time.monotonic() + 30
        while (worker.waiting or worker.running) and time.monotonic() < patience:
            time.sleep(0.05)
        tasks = worker.waiting + worker.running
        sessions = len(store.list())
        for kept in store.list():
            store.delete(kept.key)
        after = device_arrays()
        figures = {
            "prefills": server.metric("prefills_total"),
            "dropped_answers": server.metric("cancelled_total", stage="answer"),
            "dropped_prefills": server.metric("cancelled_total", stage="prefill"),
        }
    quantile = lambda values, q: float(np.quantile(values, q)) if values else None  # noqa: E731
    return {
        **vars(load),
        "completed": len(tally.whole_s),
        "left": tally.left,
        "errors": tally.errors,
        "cached": tally.cached,
        "seconds": seconds,
        "requests_per_s": len(tally.whole_s) / seconds,
        **{f"first_token_p{q}_s": quantile(tally.first_s, q / 100) for q in (50, 99)},
        **{f"whole_p{q}_s": quantile(tally.whole_s, q / 100) for q in (50, 99)},
        **figures,
        "sessions": sessions,
        "tasks_left": tasks,
        "device_arrays": {"before": before, "after": after},
    }


@command("python benchmarks/serve_load.py")
def main(argv: list[str]) -> int:
    """Exit status 1 where there was an error or something was left behind."""
    parser = Parser(description=__doc__)
    for name, value in vars(Load()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    engine = apb_jax.Engine(load("tiny"), "full", apb_jax.make_mesh(sp=1))
    result = run_load(engine, Load(**vars(parser.parse_args(argv))))
    print(json.dumps(result | {"device": jax.devices()[0].device_kind, "versions": versions()}))
    held = result["device_arrays"]
    return int(bool(result["errors"]) or result["tasks_left"] > 0 or held["before"] != held["after"])


if __name__ == "__main__":
    sys.exit(main())
