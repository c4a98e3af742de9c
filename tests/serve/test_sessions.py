"""A document is prefilled once: recognised in messages, by its id, by those who come together; and told truly."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serve.books import ask, book, until

from apb_jax.serve.worker import Limits


def chat(http: httpx.Client, messages: Any, **more: Any) -> Any:
    reply = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4} | more)
    assert reply.status_code == 200, reply.text
    return reply.json()


def cached(reply: Any) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_second_question_runs_no_prefill(server: Any, http: httpx.Client, engine: Any) -> None:
    text = book(10)
    before = server.metric("prefills_total")
    first = chat(http, ask(text, "Who saw the river?"))
    assert server.metric("prefills_total") == before + 1
    assert cached(first) == 0
    second = chat(http, ask(text, "What is near the garden?"))
    assert server.metric("prefills_total") == before + 1
    assert cached(second) == len(engine.prompt(text, "?").document)
    assert second["choices"][0]["message"]["content"] == engine.generate(text, "What is near the garden?", 4).text


def test_later_turns_and_instructions_reuse_the_document(server: Any, http: httpx.Client) -> None:
    text = book(11)
    first = chat(http, ask(text, "Who saw the river?"))
    before = server.metric("prefills_total")
    follow = [
        *ask(text, "Who saw the river?"),
        first["choices"][0]["message"],
        {"role": "user", "content": "And then?"},
    ]
    instructed = [{"role": "system", "content": "Be brief."}, *ask(text, "Who?\n\nAnd where, in two paragraphs?")]
    tokens = cached(chat(http, follow))
    assert tokens > 100
    assert cached(chat(http, instructed)) == tokens
    assert server.metric("prefills_total") == before


def test_a_short_chat_is_served_without_a_document(http: httpx.Client) -> None:
    chat(http, [{"role": "user", "content": "Hello"}])
    again = chat(http, [{"role": "user", "content": "Hello there"}])
    assert cached(again) == 1  # the begin token, which all of them share


def test_documents_are_resources(server: Any, http: httpx.Client, engine: Any) -> None:
    text = book(12)
    made = http.post("/v1/documents", json={"text": text, "name": "../../etc/passwd"})
    assert made.status_code == 201
    name = made.json()["id"]
    assert http.post("/v1/documents", json={"text": text}).status_code == 200
    until(lambda: http.get(f"/v1/documents/{name}").json()["status"] == "ready")
    told = http.get(f"/v1/documents/{name}").json()
    tokens = len(engine.prompt(text, "?").document)
    assert told["tokens"] == tokens
    assert told["name"] == "../../etc/passwd"  # a label, nowhere a path
    config = engine.model.config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert tokens * row <= told["session_bytes"] < 2 * tokens * row
    assert told["layout"][0]["block"] >= tokens
    assert name in [one["id"] for one in http.get("/v1/documents").json()["data"]]

    before = server.metric("prefills_total")
    answer = http.post(
        f"/v1/documents/{name}/questions", json={"question": "Who saw the river?", "max_tokens": 4}
    ).json()
    assert answer["object"] == "answer"
    assert answer["document_id"] == name
    assert answer["text"] == engine.generate(text, "Who saw the river?", 4).text
    assert cached(answer) == tokens
    by_id = chat(http, [{"role": "user", "content": "Who saw the river?"}], document_id=name)
    assert by_id["choices"][0]["message"]["content"] == answer["text"]
    assert server.metric("prefills_total") == before

    assert http.delete(f"/v1/documents/{name}").json()["deleted"] is True
    assert name not in [one["id"] for one in http.get("/v1/documents").json()["data"]]
    for reply in (http.get(f"/v1/documents/{name}"), http.delete(f"/v1/documents/{name}")):
        assert reply.status_code == 404
    gone = http.post("/v1/chat/completions", json={"messages": ask("", "Who?"), "document_id": name})
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "document_id")


def test_files_are_documents(http: httpx.Client) -> None:
    made = http.post("/v1/documents", files={"file": ("book.txt", book(13).encode())})
    assert (made.status_code, made.json()["name"]) == (201, "book.txt")
    until(lambda: http.get(f"/v1/documents/{made.json()['id']}").json()["status"] == "ready")
    for file, words in (((b"\xff\xfe\x00"), "not UTF-8"), (b"  \n", "empty")):
        wrong = http.post("/v1/documents", files={"file": ("x", file)})
        assert wrong.status_code == 400
        assert words in wrong.json()["error"]["message"]
    assert http.post("/v1/documents", data={"text": "x"}).status_code == 415
    head = {"content-type": "multipart/form-data"}
    assert http.post("/v1/documents", content=b"broken", headers=head).status_code == 400


def test_prefills_that_come_together_run_once(server: Any, http: httpx.Client, brake: Any) -> None:
    text = book(14)
    before = server.metric("prefills_total")
    brake.hold("prefill", 1)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(chat, http, ask(text, f"Question {i}?")) for i in range(4)]
        assert brake.stopped.wait(30)
        until(lambda: server.service.loaded.worker.waiting == 4)
        brake.release()
        replies = [one.result() for one in asked]
    assert server.metric("prefills_total") == before + 1
    assert [cached(reply) for reply in replies] == [0, 0, 0, 0]


def test_progress_comes_from_the_layers(http: httpx.Client, engine: Any) -> None:
    text = book(15)
    body = {"messages": ask(text, "Who?"), "stream": True, "return_progress": True, "max_tokens": 2}
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: ") and line != "data: [DONE]"]
    chunks = [json.loads(line) for line in lines]
    progress = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert all(chunk["choices"] == [] for chunk in chunks if "prompt_progress" in chunk)
    tokens, layers = len(engine.prompt(text, "?").document), engine.model.config.num_layers
    assert [p["processed"] for p in progress] == [tokens * done // layers for done in range(layers + 1)]
    assert all(p["cache"] == 0 and p["total"] > tokens for p in progress)
    times = [p["time_ms"] for p in progress]
    assert times == sorted(times)
    assert progress[0]["eta_ms"] is None
    assert progress[-1]["eta_ms"] == 0
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        (only,) = [json.loads(line[6:])["prompt_progress"] for line in reply.iter_lines() if "prompt_progress" in line]
    assert only["cache"] == only["processed"] == tokens


def test_a_silent_stream_is_pinged(http: httpx.Client, brake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apb_jax.serve.streaming.PING_S", 0.05)
    brake.hold("prefill", 0)
    body = {"messages": ask(book(16), "Who?"), "stream": True, "max_tokens": 2}
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        for line in lines:
            if line == ": ping":
                break
        brake.release()
        assert "data: [DONE]" in list(lines)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_ends_its_prefill_at_the_next_layers(server: Any, brake: Any, streaming: bool) -> None:
    before = server.metric("cancelled_total", stage="prefill"), server.metric("prefills_total")
    brake.hold("prefill", 2)
    body = {"messages": ask(book(20 + streaming), "Who?"), "stream": streaming}
    leave(server, body, brake)
    until(lambda: server.metric("cancelled_total", stage="prefill") == before[0] + 1)
    assert server.metric("prefills_total") == before[1]
    assert max(done for stage, done in brake.seen if stage == "prefill") <= 3
    assert server.service.loaded.worker.waiting == 0


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_ends_its_answer_at_the_next_chunk(server: Any, brake: Any, streaming: bool) -> None:
    before = server.metric("cancelled_total", stage="answer")
    brake.hold("decode", 17)
    prompt = [5 + i % 50 for i in range(80)]  # goes on and on
    leave(server, {"prompt": prompt, "max_tokens": 2000, "stream": streaming, "logprobs": 0}, brake, "completions")
    until(lambda: server.metric("cancelled_total", stage="answer") == before + 1)
    assert max(done for stage, done in brake.seen if stage == "decode") <= 17 + 2 * 16
    assert server.service.loaded.worker.running == 0


def leave(server: Any, body: Any, brake: Any, path: str = "chat/completions") -> None:
    """Send a request, close the connection while the engine stands still, and let it go on."""
    raw = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        assert brake.stopped.wait(30)
    until(lambda: gone(server))
    brake.release()


def gone(server: Any) -> bool:
    """Whether every ticket of the engine's thread was cancelled."""
    worker = server.service.loaded.worker
    tickets = [*worker._running, *(ticket for prefill in worker.prefills.values() for ticket in prefill.waiters)]
    return bool(tickets) and all(ticket.cancelled for ticket in tickets)


def test_a_prefill_that_others_wait_for_goes_on(server: Any, http: httpx.Client, brake: Any) -> None:
    text = book(30)
    before = server.metric("prefills_total")
    brake.hold("prefill", 2)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(chat, http, ask(text, "Who stays?"))
        assert brake.stopped.wait(30)
        with http.stream("POST", "/v1/chat/completions", json={"messages": ask(text, "Who?"), "stream": True}) as reply:
            next(reply.iter_lines())
            until(lambda: server.service.loaded.worker.waiting == 2)
        brake.release()
        assert stays.result()["choices"][0]["finish_reason"]
    assert server.metric("prefills_total") == before + 1


def test_a_full_queue_says_when_to_come_back(another: Callable[..., Any], brake: Any) -> None:
    server = another(limits=Limits(queue=2, running=1))
    brake.hold("prefill", 1)
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(chat, http, ask(book(40), f"Question {i}?")) for i in range(2)]
        assert brake.stopped.wait(30)
        until(lambda: server.service.loaded.worker.waiting == 2)
        full = http.post("/v1/chat/completions", json={"messages": ask("a", "b")})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) > 0
        assert full.json()["error"]["type"] == "rate_limit_error"
        brake.release()
        assert all(one.result()["choices"] for one in asked)


def test_answers_take_turns_and_a_prefill_holds_none_up(server: Any, http: httpx.Client, brake: Any) -> None:
    """While a document is prefilled, an answer goes on: at most one layer group between two of its chunks."""
    prompt = [5 + i % 50 for i in range(80)]
    say = lambda: http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 300})  # noqa: E731
    say()  # compiles
    brake.hold("decode", 17)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(say)
        assert brake.stopped.wait(30)
        prefill = pool.submit(chat, http, ask(book(50), "Who?"))
        until(lambda: server.service.loaded.worker.waiting == 1)
        brake.release()
        assert answer.result().json()["usage"]["completion_tokens"] == 300
        prefill.result()
    stages = [stage for stage, _ in brake.seen if stage in ("prefill", "decode")]
    first, last = stages.index("prefill"), len(stages) - stages[::-1].index("prefill")
    assert "decode" in stages[first:last]
    pairs = list(zip(stages[first:last], stages[first + 1 : last], strict=False))
    assert ("prefill", "prefill") not in pairs


def test_sessions_beyond_the_limit_are_let_go(engine: Any, another: Callable[..., Any]) -> None:
    server = another()
    store = server.service.loaded.store
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        chat(http, ask(book(60), "Who?"))
        (one,) = store.list()
        store.limit = int(2.5 * one.bytes)
        for seed in (61, 62, 60):
            chat(http, ask(book(seed), "Who?"))
            assert sum(kept.bytes for kept in store.list()) <= store.limit
        assert len(store.list()) == 2
        store.limit = one.bytes // 2
        store.make_room(0)
        reply = chat(http, ask(book(60), "Who?"))  # answered all the same, and not kept
        assert reply["choices"][0]["finish_reason"]
        assert store.list() == []
