"""The command: ready line, health while loading, signals, and one line for what cannot be."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import ROOT
from serve.books import book

from apb_jax.arguments import size
from apb_jax.errors import UserError
from apb_jax.serve.__main__ import main
from apb_jax.serve.options import parse
from apb_jax.serve.start import choose_method
from apb_jax.weights.checkpoint import load


def start(*options: str) -> subprocess.Popen[str]:
    flags = os.environ | {"APB_JAX_CACHE": "off", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "apb_jax.serve", *options]
    return subprocess.Popen(command, env=flags, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_ready_serves_and_finishes_running_answers(number: int) -> None:
    process = start("--port", "0", "--sp", "2" if number == signal.SIGINT else "1")
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+)\n", line)
        assert found, process.communicate()
        with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as http:
            assert http.get("/health").json() == {"status": "ok"}
            body = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 60, "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(number)
                assert "data: [DONE]" in list(lines)
        assert process.wait(60) == 0
        assert process.communicate() == ("", "")
    finally:
        process.kill()


def test_a_reply_is_not_held_back_for_an_acknowledgement(http: httpx.Client, server: Any) -> None:
    """Head and body are two packets: under Nagle's algorithm the second waits 40 ms for the client's answer."""
    assert http.get("/health").status_code == 200
    (connection, *_) = server._server.server_state.connections
    taken = connection.transport.get_extra_info("socket")
    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_health_is_503_while_the_model_loads() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start("--port", str(port))
    try:
        seen: list[int] = []
        end = time.monotonic() + 60
        while 200 not in seen and time.monotonic() < end:
            try:
                reply = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=30)
            except httpx.ConnectError:
                time.sleep(0.02)
                continue
            if reply.status_code == 503 and 503 not in seen:
                asked = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False, timeout=30)
                assert asked.status_code in (503, 200)
            seen.append(reply.status_code)
        assert set(seen) == {503, 200}
        assert seen == sorted(seen, reverse=True)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def refused(capsys: Any, *options: str) -> str:
    assert main(list(options)) == 2
    error = str(capsys.readouterr().err)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_wrong_options_are_one_line(capsys: Any, tmp_path: Path) -> None:
    assert "--port is 70000" in refused(capsys, "--port", "70000")
    assert "did you mean --model?" in refused(capsys, "--modell", "tiny")
    assert "write for example 512m" in refused(capsys, "--max-body", "lots")
    assert "no such file" in refused(capsys, "--port", "0", "--api-key-file", str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    assert "is empty" in refused(capsys, "--port", "0", "--api-key-file", str(tmp_path / "empty"))
    assert "is not an origin" in refused(capsys, "--cors-origin", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port 0, any free one" in refused(capsys, "--port", str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "tyni"), "tyni"),
        (("--method", "rign"), "did you mean 'ring'?"),
        (("--method", "apb"), "embed_query=false"),
        (("--sp", "1", "--method", "minference"), "--method full"),
        (("--sp", "99"), "99"),
    ],
)
def test_what_the_model_cannot_do_is_one_line_too(capsys: Any, options: tuple[str, ...], words: str) -> None:
    assert words in refused(capsys, "--port", "0", *options)


def test_apb_is_served_where_it_does_not_read_the_question(another: Any) -> None:
    config = parse(["--method", "apb", "--set", "embed_query=false"]).run
    assert choose_method(config, load("tiny"), 8).options == {"embed_query": False}
    for scorer, words in (("query", "ranks keys by the question"), ("heads", "give --heads FILE")):
        asked = parse(["--method", "apb", "--set", "embed_query=false", "--set", f"scorer={scorer}"]).run
        with pytest.raises(UserError, match=words):
            choose_method(asked, replace(load("tiny"), retaining_hidden=None), 8)
    free = parse(["--method", "apb", "--set", "embed_query=false", "--set", "scorer=expected"]).run
    assert choose_method(free, replace(load("tiny"), retaining_hidden=None), 8).options["scorer"] == "expected"


def test_sizes() -> None:
    assert [size(1)(text) for text in ("4096", "64M", "1.5g", "2GB")] == [4096, 64 << 20, 3 << 29, 2 << 30]
    assert book(1) != book(2)
