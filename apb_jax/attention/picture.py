"""``python -m apb_jax.attention.picture FILE.svg``: which keys of the document the rows of each APB shard see."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from apb_jax.attention.apb import APB
from apb_jax.attention.inputs import Prompt

SHARDS, DOCUMENT = 8, 131_072
METHOD = APB(anchor_tokens=4096, passing_tokens=2048)
"""The paper's sizes at 128K (its Table 8)."""
SLIVERS = 4
"""Bars that stand for a block's passing tokens: their places are drawn at random, their widths add up."""

# The screen's colours, of a lightness that stands out on white and on black; the text is a grey that is read on both.
COLOURS = {"passing": "#d9a400", "anchor": "#c850c0", "block": "#1ba3c6"}
TEXT, FAINT, UNSEEN = "#7a828c", "#8b949e", 0.2
LEFT, TOP, WIDTH, HEIGHT = 76, 34, 744, 296


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> str:
    """One filled rectangle."""
    faint = "" if opacity == 1 else f' fill-opacity="{opacity}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{faint}/>'


def label(x: float, y: float, words: str, anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def passing_places(block: int, method: APB) -> np.ndarray:
    """Where the slivers of each block begin, in document tokens, int [N, SLIVERS]: one in each equal part of a block.

    The first block passes nothing of what the anchor holds already.
    """
    random = np.random.default_rng(4)
    first = np.where(np.arange(SHARDS) == 0, method.anchor_tokens, 0)
    part = (block - first) / SLIVERS
    free = part - method.passing_tokens / SLIVERS
    inside = np.arange(SLIVERS) * part[:, None] + random.random((SHARDS, SLIVERS)) * free[:, None]
    return np.asarray(np.arange(SHARDS) * block + first)[:, None] + inside


def picture(method: APB = METHOD) -> str:
    """The SVG: a row of the picture is a row of attention (a document token), a column a key; the diagonal is now."""
    tokens = np.zeros(DOCUMENT, np.int32)
    layout = method.layout([Prompt(tokens, tokens[:32], tokens[:32])], SHARDS)
    last = method.visible_keys(layout, SHARDS - 1)
    block, anchor = last["block"], last["anchor"]
    across, down = WIDTH / DOCUMENT, HEIGHT / SHARDS
    places = passing_places(block, method)
    shapes = [
        f'<path d="M{LEFT},{TOP} L{LEFT + WIDTH},{TOP + HEIGHT} H{LEFT} Z" fill="{FAINT}" fill-opacity="{UNSEEN}"/>',
        label(LEFT, TOP - 14, "keys: the document, 0"),
        label(LEFT + WIDTH, TOP - 14, f"{DOCUMENT:,}", "end"),
    ]
    for shard in range(SHARDS):
        y, height = TOP + shard * down, down - 2
        own = LEFT + shard * block * across
        shapes.append(label(LEFT - 12, y + height / 2 + 4, f"shard {shard}", "end"))
        if shard:
            shapes.append(rect(LEFT, y, anchor * across, height, COLOURS["anchor"]))
        width = method.passing_tokens / SLIVERS * across
        shapes += [rect(LEFT + p * across, y, width, height, COLOURS["passing"]) for p in places[:shard].flat]
        shapes.append(
            f'<path d="M{own:.1f},{y:.1f} L{own + block * across:.1f},{y + height:.1f} H{own:.1f} Z" '
            f'fill="{COLOURS["block"]}"/>'
        )
    legend = (
        (COLOURS["anchor"], 1.0, f"anchor: {anchor:,}, with the question in it"),
        (COLOURS["passing"], 1.0, f"passing: the best {method.passing_tokens:,} of each earlier block"),
        (COLOURS["block"], 1.0, f"own block: {block:,}, causally"),
        (FAINT, UNSEEN, "not seen"),
    )
    x = LEFT + 0.54 * WIDTH  # right of the diagonal
    for line, (colour, opacity, words) in enumerate(legend):
        y = TOP + 14 + 22 * line
        shapes.append(rect(x, y, 12, 12, colour, opacity))
        shapes.append(label(x + 20, y + 10.5, words))
    style = f'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif" font-size="13" fill="{TEXT}"'
    size = f'viewBox="0 0 {LEFT + WIDTH + 20} {TOP + HEIGHT + 14}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>'
    return "\n".join([head, "<title>The keys that each APB shard sees</title>", *shapes, "</svg>", ""])


def main(argv: list[str]) -> int:
    """Write the picture; 2 where no name is given."""
    if len(argv) != 1:
        print("python -m apb_jax.attention.picture FILE.svg", file=sys.stderr)
        return 2
    Path(argv[0]).write_text(picture())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
