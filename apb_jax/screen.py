"""What a person sees: the layout as a picture, a live bar over the stages, tables of results."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from apb_jax.attention.base import AttentionMethod, Layout

WIDTH = 48
STYLE = {"earlier": "yellow", "passing": "yellow", "anchor": "magenta", "block": "cyan"}
UNITS = {"prefill": "layers", "decode": "tokens", "load weights": "bytes"}


def tokens(count: float) -> str:
    """A count of tokens for people: 131072 -> 128K."""
    if count >= 1 << 20 and count % (1 << 20) == 0:
        return f"{int(count) >> 20}M"
    if count >= 1024 and count % 1024 == 0:
        return f"{int(count) >> 10}K"
    return f"{count:,.0f}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


class StageBar:
    """A live bar over load, compile, prefill, query and decode, with elapsed time and ETA; an ``engine.Progress``."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[count]:>16}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            for task in self.tasks.values():
                if stage.startswith("compile"):
                    break
                self.progress.update(task, completed=self.progress.tasks[task].total)
            self.tasks[stage] = self.progress.add_task(stage, total=total, count="")
        count = f"{size(done)} / {size(total)}" if UNITS.get(stage) == "bytes" else f"{done}/{total}"
        if stage.startswith("compile"):
            count = ""
        self.progress.update(self.tasks[stage], completed=done, total=total, count=count)


def layout_picture(layout: Layout, method: AttentionMethod, mesh: dict[str, int]) -> Panel:
    """Every shard's keys as a bar: what came from earlier shards, the anchor, and its own block."""
    prefix = dict(layout.segments[:-1])
    passed = getattr(method, "passing_tokens", 0)
    block = int(layout.block_rows[0])

    def keys(shard: int) -> dict[str, int]:
        earlier = {"earlier": shard * block} if method.can.exact else {"passing": shard * passed}
        return earlier | (prefix if shard else {}) | {"block": block}

    widest = max(sum(keys(shard).values()) for shard in range(layout.shards))
    lines = []
    for shard in range(layout.shards):
        bar = Text(f"shard {shard:>2} ")
        for name, count in keys(shard).items():
            if count:
                bar.append("█" * max(1, round(WIDTH * count / widest)), style=STYLE.get(name, "blue"))
        first = shard * block
        last = min(first + block, int(layout.document_tokens[0]))
        lines.append(bar.append(f"  {first:,}..{last:,}", style="dim"))
    shown = keys(layout.shards - 1)
    words = {
        "earlier": "all earlier blocks",
        "passing": f"passing: {passed:,} of each earlier shard, per KV head",
        "block": f"own block: {block:,}, causally",
    }
    lines.append(Text("the keys that a block's rows see:", style="dim"))
    for name, count in shown.items():
        if count:
            lines.append(
                Text(" █ ", style=STYLE.get(name, "blue")).append(words.get(name, f"{name}: {count:,}"), "dim")
            )
    title = f"{method.name} on a mesh of " + " x ".join(f"{axis}={n}" for axis, n in mesh.items())
    return Panel(Group(*lines), title=title, title_align="left", expand=False)


def result_table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> Table:
    """A plain table, first column left, the others right."""
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The closing table's rows from a run's JSON object."""
    decode = result["decode_ms_per_token"]
    return [
        ("document", f"{result['document_tokens']:,} tokens"),
        ("prefill", f"{result['prefill_s']:.3f} s"),
        ("prefill speed", f"{result['prefill_tokens_per_s']:,.0f} tok/s"),
        ("first token, after the prefill", f"{result['query_s']:.3f} s"),
        ("decode", "-" if decode is None else f"{decode:.2f} ms/token"),
        (f"memory per device, {result['memory_source']}", size(result["peak_bytes_per_device"])),
        *([("moved per layer and shard", size(result["bytes_per_layer"]))] if "bytes_per_layer" in result else []),
        ("compile, not counted above", f"{result['compile_s']:.1f} s"),
    ]


__all__ = ["StageBar", "figures", "layout_picture", "result_table", "size", "tokens"]
