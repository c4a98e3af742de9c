"""A document in the server on a GPU: time to the first token, first and later; sessions to disk and back.

    python -m benchmarks.serve_latency                      Llama-3.1-8B shapes, random weights, 128K tokens
    python -m benchmarks.serve_latency --model tiny --tokens 2k --folder /tmp

Over HTTP, one token asked: a document that the server does not know, then the same one again (whole text, and by its
id), while its session is being written, after a restart from disk. Beside them what this machine's disk and its bus do
with plain bytes, so that save and load stand as shares. Each stage prints a JSON line; one that fails is told and left.
Random weights speak through the packaged tokenizer: ids it does not know have no text, so whole replies are timed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np

import apb_jax
from apb_jax.arguments import length as parse_length
from apb_jax.command import Parser, command
from apb_jax.prompt.style import PromptStyle
from apb_jax.report import versions
from apb_jax.serve.background import Background
from apb_jax.serve.disk_store import DiskStore
from apb_jax.serve.service import Plan
from apb_jax.serve.store import DeviceStore
from apb_jax.synthetic.needle import needle_prompt

GIB = 1 << 30


def drop_cache(folder: Path) -> None:
    """Let go of the pages of all files below, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def disk_speed(folder: Path, size: int) -> dict[str, float]:
    """GB/s of writing with fsync, and of reading back from the disk and from memory, of one file."""
    block = np.random.default_rng(0).integers(0, 255, 1 << 26, np.uint8)
    path = folder / "plain" / "file"
    path.parent.mkdir()
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // block.nbytes):
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())
    found = {"write_gb_per_s": size / 1e9 / (time.perf_counter() - began)}
    drop_cache(path.parent)
    for name in ("read_cold_gb_per_s", "read_warm_gb_per_s"):
        began = time.perf_counter()
        np.fromfile(path, np.uint8)
        found[name] = size / 1e9 / (time.perf_counter() - began)
    shutil.rmtree(path.parent)
    return found


def bus_speed(size: int) -> dict[str, float]:
    """GB/s of so many bytes between host and device, the median of five."""
    block = np.ones(size, np.uint8)
    there, back = [], []
    for _ in range(5):
        began = time.perf_counter()
        on_device = jax.block_until_ready(jax.device_put(block))
        there.append(time.perf_counter() - began)
        fresh = jax.block_until_ready(on_device + np.uint8(1))  # no copy of it is on the host yet
        began = time.perf_counter()
        np.asarray(fresh)
        back.append(time.perf_counter() - began)
    return {
        "host_to_device_gb_per_s": size / 1e9 / statistics.median(there),
        "device_to_host_gb_per_s": size / 1e9 / statistics.median(back),
    }


class Bench:
    """One engine, a folder, and the document."""

    def __init__(self, args: Any, folder: Path) -> None:
        self.folder, self.args = folder, args
        speaker = apb_jax.load("tiny")
        model = speaker if args.model == "tiny" else apb_jax.load(args.model, weights="random")
        model = replace(model, tokenizer=speaker.tokenizer, stop_ids=())
        style = PromptStyle(template="none")
        self.engine = apb_jax.Engine(model, args.method, apb_jax.make_mesh(sp=1), prompt_style=style)
        made = [needle_prompt(speaker.tokenizer, args.tokens - 256, str(4711 + i), 0.5, i) for i in range(2)]
        self.texts = [one.document.replace("\n\n", "\n") for one in made]
        self.question = made[0].query

    def serve(self, disk: bool) -> Background:
        """A server around the engine."""
        device = DeviceStore(60 * GIB)
        sessions = self.folder / "sessions"
        make = lambda engine: DiskStore(engine, device, sessions, 64 * GIB) if disk else device  # noqa: E731
        return Background(Plan(lambda: self.engine, make))

    def ask(self, server: Background, text: str | None, document: str | None = None) -> dict[str, Any]:
        """One question, one token; seconds over HTTP and the server's own parts."""
        content = f"{text}\n\n{self.question}" if text else self.question
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "document_id": document}
        with httpx.Client(base_url=server.url, timeout=3600, trust_env=False) as http:
            http.get("/health")
            began = time.perf_counter()
            reply = http.post("/v1/chat/completions", json=body)
            seconds = time.perf_counter() - began
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code} {reply.text[:500]}")
        told = reply.json()
        cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        return {"seconds": seconds, "cached_tokens": cached, **told["timings"]}

    def median(self, server: Background, text: str | None, document: str | None = None) -> dict[str, Any]:
        """Nine of them."""
        rows = [self.ask(server, text, document) for _ in range(9)]
        return {name: statistics.median(row[name] for row in rows) for name in rows[0]}

    def first_tokens(self) -> dict[str, Any]:
        """A server without a disk."""
        with self.serve(False) as server:
            self.ask(server, self.texts[0])
            self.ask(server, self.texts[0])  # all is compiled
            first = self.ask(server, self.texts[1])
            again = self.median(server, self.texts[1])
            with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
                name = http.get("/v1/documents").json()["data"][0]["id"]
            by_id = self.median(server, None, name)
            self.document = server.service.library.find(name)
            found = server.service.loaded.store.get(self.document.key)
            assert found is not None
            self.session = session = found
            query = server.service.loaded.wording.query("", [(self.question, "")])
            direct = []
            for _ in range(9):
                began = time.perf_counter()
                session.start(query.tolist(), 1)
                direct.append(time.perf_counter() - began)
        return {
            "first": first, "again": again, "again_by_id": by_id, "query_phase_alone_s": statistics.median(direct),
            "share_of_first": by_id["seconds"] / first["seconds"], "query_tokens": len(query),
        }  # fmt: skip

    def disk(self) -> dict[str, Any]:
        """A server with a disk, and another one on what it left."""
        found: dict[str, Any] = {}
        with self.serve(True) as server:
            server.service.library.add(self.document)
            server.service.loaded.store.put(self.document, self.session)
            began = time.perf_counter()
            found["again_while_written"] = self.ask(server, self.texts[1])
            store: Any = server.service.loaded.store
            store._writer.submit(int).result()
            found["written_after_s"] = time.perf_counter() - began
            found["session_gb"] = sum(one.bytes for one in store.list() if one.where == "disk") / 1e9
        del self.session
        drop_cache(self.folder / "sessions")
        for name in ("restarted_cold", "restarted_warm"):
            with self.serve(True) as server:
                found[name] = self.ask(server, self.texts[1])
                found[f"{name}_load_s"] = server.metric("load_seconds_total")
        return found

    def store(self) -> dict[str, Any]:
        """Save and load without a server."""
        expected = self.session.ask(self.question, 4).tokens  # type: ignore[union-attr]
        folder, programs = self.folder / "direct", self.engine.programs
        began = time.perf_counter()
        _ = self.engine.fingerprint
        found: dict[str, Any] = {"fingerprint_first_s": time.perf_counter() - began}
        began = time.perf_counter()
        size = self.session.save(folder).bytes
        found |= {"session_gb": size / 1e9, "save_s": time.perf_counter() - began}
        drop_cache(folder)
        for name in ("cold", "warm"):
            began, compiled = time.perf_counter(), programs.compile_s
            loaded = self.engine.load_session(folder)
            found[f"load_{name}_s"] = time.perf_counter() - began - (programs.compile_s - compiled)
            found[f"load_{name}_gb_per_s"] = size / 1e9 / found[f"load_{name}_s"]
        found["same_answer"] = loaded.ask(self.question, 4).tokens == expected  # type: ignore[union-attr]
        found["save_gb_per_s"] = size / 1e9 / found["save_s"]
        shutil.rmtree(folder)
        return found


@command("python -m benchmarks.serve_latency")
def main(argv: list[str]) -> int:
    """Exit status 1 where a stage failed."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--method", default="full")
    parser.add_argument("--tokens", type=parse_length, default=131072)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--limit-s", type=float, default=150, help="no stage is begun after so many seconds")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    began, failed = time.perf_counter(), 0
    facts = {"model": args.model, "method": args.method, "tokens": args.tokens, "versions": versions(),
             "device": jax.devices()[0].device_kind}  # fmt: skip
    print(json.dumps(facts), flush=True)

    def stage(name: str, work: Callable[[], Any]) -> Any:
        nonlocal failed
        if time.perf_counter() - began > args.limit_s:
            print(f"{name}: left out, {args.limit_s:.0f} s are over", flush=True)
            return None
        started = time.perf_counter()
        try:
            found = work()
        except Exception:  # noqa: BLE001 - told, and the next stage may still say something
            traceback.print_exc()
            failed += 1
            return None
        row = {"stage": name, "stage_s": time.perf_counter() - started}
        if isinstance(found, dict):
            row |= found
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | facts) + "\n")
        print(json.dumps(row), flush=True)
        return found

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        bench = stage("engine", lambda: Bench(args, folder))
        if bench is None:
            return 1
        stage("weights", lambda: jax.block_until_ready(jax.tree.leaves(bench.engine.state)) and {})
        stage("first_tokens", bench.first_tokens)
        small = args.model == "tiny"
        bus = stage("bus", lambda: bus_speed(1 << 26 if small else GIB))
        plain = stage("disk", lambda: disk_speed(folder, 1 << 28 if small else 4 * GIB))
        direct = stage("store", bench.store)
        if bus and plain and direct:
            stage("shares", lambda: {
                "save_of_disk": direct["save_gb_per_s"] / plain["write_gb_per_s"],
                "load_cold_of_disk": direct["load_cold_gb_per_s"] / plain["read_cold_gb_per_s"],
                "load_warm_of_bus": direct["load_warm_gb_per_s"] / bus["host_to_device_gb_per_s"],
                "save_of_bus": direct["save_gb_per_s"] / bus["device_to_host_gb_per_s"],
            })  # fmt: skip
        stage("server_disk", bench.disk)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
