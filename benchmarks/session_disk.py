"""Seconds and GB/s of saving and loading a session, and of the fingerprint of weights.

    python benchmarks/session_disk.py --model llama3.1-8b --tokens 32000 --folder /tmp --out benchmarks/results/x.jsonl

Random weights. Loads read files that were just written, so they come from memory where the machine has room for them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import apb_jax
from apb_jax.attention.registry import MethodSpec
from apb_jax.command import Parser, command
from apb_jax.report import versions
from apb_jax.weights.fingerprint import fingerprint


@command("python benchmarks/session_disk.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--tokens", type=int, default=32000)
    parser.add_argument("--shards", type=int, default=8, help="on one device")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    args = parser.parse_args(argv)
    model = apb_jax.load(args.model, weights="random")
    method = MethodSpec("apb", {"embed_query": False, "scorer": "expected"})
    engine = apb_jax.Engine(model, method, apb_jax.make_mesh(sp=1), shards=args.shards)
    jax.block_until_ready(jax.tree.leaves(engine.state))
    row: dict[str, object] = {"model": args.model, "tokens": args.tokens, "shards": args.shards}
    row |= {"device": jax.devices()[0].device_kind, "dtype": model.dtype.name, "versions": versions()}

    def timed(name: str, work: object, count: int = 1) -> object:
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            result = work()  # type: ignore[operator]
            taken.append(time.perf_counter() - began)
        row[name] = statistics.median(taken)
        return result

    timed("fingerprint_first_s", lambda: engine.fingerprint)
    arrays = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(engine.state)}
    timed("fingerprint_s", lambda: fingerprint(arrays), 3)
    row["weights_bytes"] = sum(x.nbytes for x in arrays.values())
    document = np.random.default_rng(0).integers(0, 1000, args.tokens)
    for _ in range(2):  # the first compiles
        session = engine.prefill([engine.prompt(document, [1, 2, 3])])
        answer = session.ask([5, 6, 7], 8, stop_ids=())
    row |= {"prefill_s": session.prefill_s, "query_s": answer.query_s}  # type: ignore[union-attr]
    folders = [args.folder / f"session{i}" for i in range(3)]
    made = iter(folders)
    manifest = timed("save_s", lambda: session.save(next(made)), 3)
    row["session_bytes"] = manifest.bytes  # type: ignore[attr-defined]
    engine.load_session(folders[0])  # compiles
    loaded = timed("load_s", lambda: engine.load_session(folders[1]), 3)
    row["same_answer"] = loaded.ask([5, 6, 7], 8, stop_ids=()).tokens == answer.tokens  # type: ignore[attr-defined,union-attr]
    block = np.ones(1 << 30, np.uint8)
    timed("host_to_device_s_per_gib", lambda: jax.block_until_ready(jax.device_put(block)), 5)
    for folder in folders:
        shutil.rmtree(folder)
    print(json.dumps(row, indent=1))
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
