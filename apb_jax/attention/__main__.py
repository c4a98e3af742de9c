"""``python -m apb_jax.attention``: the table of methods in docs/methods.md, from what they say about themselves."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from apb_jax.attention.registry import METHODS
from apb_jax.command import Parser, command


def table() -> str:
    """Markdown, one row per method."""
    head = ("method", "file", "source", "result", "needs", "shards", "STRING", "tested by")
    lines = [head, ("---",) * len(head)]
    for name, kind in METHODS.items():
        can = kind.can
        needs = [
            *(["trained heads"] if can.needs_heads else []),
            *(["trained heads or the query"] if can.needs_scorer else []),
            *(["the query in prefill"] if can.needs_query_in_prefill else []),
        ]
        lines.append(
            (
                f"`{name}`",
                f"`{Path(inspect.getfile(kind)).name}`",
                can.paper,
                "exact" if can.exact else "approximate",
                ", ".join(needs) or "nothing",
                "1" if can.max_shards == 1 else "1 to N",
                "yes" if can.remaps_positions else "no",
                ", ".join(can.tested),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def make_parser() -> argparse.ArgumentParser:
    """The command line: no options but ``--help``."""
    return Parser(prog="python -m apb_jax.attention", description=__doc__)


@command("python -m apb_jax.attention")
def main(argv: list[str]) -> None:
    """Print the table."""
    make_parser().parse_args(argv)
    print(table())


if __name__ == "__main__":
    sys.exit(main())
