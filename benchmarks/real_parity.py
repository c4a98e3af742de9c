"""Parity of the real model with transformers: logits of texts in three languages, greedy tokens of five prompts.

    python -m benchmarks.real_parity --lengths 2,37,1000,4000,8000 --steps 200 [--out DIR]

The engine runs as in earnest (full attention, one device, float32): a document is prefilled, the last ``ROWS`` tokens
are its query. transformers (PyTorch, float32) reads the same GGUF file by itself. Needs torch and the model's file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import apb_jax
from apb_jax.command import Parser, command
from apb_jax.report import versions
from apb_jax.synthetic.packaged import NOVEL
from benchmarks.real_peer import Peer

ROWS = 200
"""Rows compared at the end of a text, at most half of it."""
CHINESE = "春天的时候，公园里开满了花，孩子们在草地上奔跑。{}年，船长离开了港口，{}个人留在岸上。"
PROMPTS = (
    ("The lighthouse on Gull Point is kept by Mary Quill.", "Who keeps the lighthouse?"),
    ("Water boils at 100 degrees Celsius at sea level.", "Explain why water boils earlier on a mountain."),
    ("def area(r):\n    return 3.14159 * r * r\n", "Write a test for this function."),
    ("春天的时候，公园里开满了花。", "Translate the text into English."),
    ("Once upon a time there was a fox who could not sleep.", "Continue the story."),
)


def texts() -> dict[str, str]:
    """A text of each kind, long enough for 8,000 tokens."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(apb_jax.__file__).parent.glob("*.py")))
    chinese = "".join(CHINESE.format(1800 + i, 37 * i % 101) for i in range(300))
    return {"english": NOVEL.read_text(encoding="utf-8"), "chinese": chinese, "code": code}


@command("python benchmarks/real_parity.py")
def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--lengths", default="2,37,1000,4000,8000")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    model = apb_jax.load("smollm2-135m", dtype="float32")
    assert model.tokenizer is not None
    assert model.folder is not None
    engine, peer = apb_jax.Engine(model, "full", apb_jax.make_mesh(sp=1)), Peer(model.folder)

    def keep(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "real_parity.jsonl").open("a") as file:
                file.write(json.dumps(row | {"model": model.name, "versions": versions()}) + "\n")

    for length in map(int, args.lengths.split(",")):
        for language, text in texts().items():
            ids = model.tokenizer.encode(text, verbose=False)[:length]
            assert len(ids) == length
            rows = min(ROWS, length // 2)
            (mine,) = engine.prefill([engine.prompt(ids[:-rows], ids[-rows:])]).logits()
            theirs = peer.logits(ids, rows)
            keep(
                {
                    "tokens": length, "text": language, "rows": rows,
                    "max_difference": float(np.abs(mine - theirs).max()),
                    "spread": float(np.ptp(theirs)),
                    "same_top": float((mine.argmax(-1) == theirs.argmax(-1)).mean()),
                }
            )  # fmt: skip
    for document, question in PROMPTS:
        prompt = engine.prompt(document, question)
        (answer,) = engine.prefill([prompt]).generate(args.steps, stop_ids=())
        theirs_ids = peer.greedy([*prompt.document.tolist(), *prompt.query.tolist()], args.steps)
        equal = sum(1 for one, other in zip(answer.tokens, theirs_ids, strict=True) if one == other)
        keep({"question": question, "steps": args.steps, "equal_tokens": equal})


if __name__ == "__main__":
    sys.exit(main())
