"""Kill a server at random moments of saving, loading, answering and pruning; what it leaves answers right or is none.

    python -m benchmarks.session_kill --kills 20

Every server runs on the folder that the killed one before it left, with room for a few sessions, while clients give it
new documents and ask the ones on disk. After each kill every session in the folder is loaded here and asked; the answer
is compared with that of a prefill. Prints one JSON object; exit status 1 where an answer differs or a session that
looks whole does not load.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

import apb_jax
from apb_jax.command import Parser, command
from apb_jax.errors import UserError
from apb_jax.report import versions
from apb_jax.session_store import kept

QUESTION = "Who saw the river?"
NEW_TOKENS = 4
ROOM = 3
"""Sessions that the folder has room for."""
DOCUMENTS = 8


def text(number: int) -> str:
    """A document of about 500 tokens, another one for every number."""
    words = "harbour lantern mountain river teacher garden winter letter engine valley music stone".split()
    pick = lambda i: words[(i * i * 7 + number * 13 + i) % len(words)]  # noqa: E731
    return "\n".join(f"The {pick(i)} of day {number * 31 + i} saw a {pick(i + 1)}." for i in range(50))


def ask_on(url: str, seed: int, seen: Counter[str]) -> None:
    """Ask about random documents until the server is gone."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as http:
        while True:
            message = f"{text(rng.randrange(DOCUMENTS))}\n\n{QUESTION}"
            body = {"messages": [{"role": "user", "content": message}], "max_tokens": NEW_TOKENS}
            try:
                reply = http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError:
                return
            seen[str(reply.status_code)] += 1


def run_and_kill(folder: Path, size: int, rng: random.Random, seen: Counter[str]) -> None:
    """One server's life."""
    command = [
        sys.executable, "-m", "apb_jax.serve", "--model", "tiny", "--sp", "1", "--port", "0", "--dtype", "float32",
        "--sessions", str(folder), "--sessions-bytes", str(ROOM * size), "--device-bytes", str(int(1.5 * size)),
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line.startswith("ready: "):
                raise UserError(f"a server on what the last one left did not start: {line!r}")
            url = line.removeprefix("ready: ").strip()
            clients = [threading.Thread(target=ask_on, args=(url, rng.randrange(1 << 30), seen)) for _ in range(3)]
            for client in clients:
                client.start()
            answered = seen.total()
            while seen.total() == answered and any(one.is_alive() for one in clients):
                time.sleep(0.01)  # the first answer compiles the programs
            time.sleep(rng.random() * 1.5)
        finally:
            server.send_signal(signal.SIGKILL)
        for client in clients:
            client.join()


def kill_servers(engine: apb_jax.Engine, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """So many lives, each on what the last one left."""
    rng, seen = random.Random(seed), Counter[str]()
    expected: dict[bytes, list[int]] = {}
    for number in range(DOCUMENTS):
        prompt = engine.prompt(text(number), QUESTION)
        session = engine.prefill([prompt])
        expected[prompt.document.tobytes()] = session.generate(NEW_TOKENS)[0].tokens
    with tempfile.TemporaryDirectory() as scratch:
        size = session.save(Path(scratch) / "s").bytes
    query = engine.prompt("", QUESTION).query
    loaded, unfinished, wrong = 0, 0, []
    for kill in range(kills):
        run_and_kill(folder, size, rng, seen)
        unfinished += len(list(folder.glob("*.partial")))
        for one in kept(folder):
            try:
                session = engine.load_session(one.folder)
                answer = session.ask(query.tolist(), NEW_TOKENS)
            except UserError as error:
                wrong.append(f"kill {kill}: {error}")
                continue
            assert isinstance(answer, apb_jax.Answer)
            loaded += 1
            if answer.tokens != expected[session.prompts[0].document.tobytes()]:
                wrong.append(f"kill {kill}: {one.folder.name} answers {answer.tokens}")
        print(f"kill {kill}: {loaded} loaded, {unfinished} unfinished, {dict(seen)}", file=sys.stderr, flush=True)
    wrong += [f"{count} replies with status {status}" for status, count in seen.items() if status != "200"]
    return {"kills": kills, "loaded": loaded, "unfinished": unfinished, "replies": dict(seen), "wrong": wrong}


@command("python -m benchmarks.session_kill")
def main(argv: list[str]) -> int:
    """Exit status 1 where something is wrong."""
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    engine = apb_jax.Engine(apb_jax.load("tiny", dtype="float32"), "full", apb_jax.make_mesh(sp=1))
    with tempfile.TemporaryDirectory() as folder:
        result = kill_servers(engine, Path(folder), args.kills, args.seed)
    print(json.dumps(result | {"versions": versions()}))
    return int(bool(result["wrong"]) or not result["loaded"])


if __name__ == "__main__":
    sys.exit(main())
