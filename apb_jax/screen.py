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

from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod

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
    if getattr(method, "shared_anchor", False) and prefix:
        prefix["anchor"] = getattr(method, "anchor_tokens", 0)  # its rows are shared out, its keys are not
    passed = getattr(method, "passing_tokens", 0)
    block = int(layout.block_rows[0])

    def keys(shard: int) -> dict[str, int]:
        whole = method.can.exact or (method.can.selects and not prefix)
        earlier = {"earlier": shard * block} if whole else {"passing": shard * passed}
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
    seen = "the keys among which the method selects:" if method.can.selects else "the keys that a block's rows see:"
    lines.append(Text(seen, style="dim"))
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
        *(recovered(result) if "recovered_mass" in result else []),
        ("compile, not counted above", f"{result['compile_s']:.1f} s"),
    ]


def recovered(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How much of full attention's mass the sampled rows saw, and which layers are dense by the method's settings."""
    share, layers = result["recovered_mass"], result["dense_layers"]
    return [
        ("attention mass recovered", f"{share['mean']:.1%}" if share else "not defined"),
        ("  in the lowest layer", f"{min(share['by_layer']):.1%}" if share else "not defined"),
        ("layers with dense prefill", f"{len(layers)} of {result['layers']}"),
    ]


def closing_table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows): a column per method, the first one's first."""
    columns = [result, *result.get("compare", [])]
    cells = [figures(column) for column in columns]
    rows = [(row[0][0], *(value for _, value in row)) for row in zip(*cells, strict=True)]
    return ("", *(column["method"] for column in columns)), rows


def receipts(result: dict[str, Any]) -> list[str]:
    """A sentence per method that was run beside: what the first one changed, and what it gained."""
    return [
        f"receipt against {other['method']}: prefill {other['speedup']:.2f}x as fast, greedy agreement "
        f"{other['receipt']['greedy_agreement']:.0%}, top-1 agreement {other['receipt']['top1_agreement']:.0%} over "
        f"{other['receipt']['rows']} query and answer positions, KL mean {other['receipt']['kl_mean']:.2g} "
        f"max {other['receipt']['kl_max']:.2g} nats"
        for other in result.get("compare", [])
    ]


def markdown(result: dict[str, Any]) -> str:
    """The run as a Markdown page: what ran, the closing table, the receipts, prediction and truth."""
    header, rows = closing_table(result)
    options = ", ".join(f"{name}={value}" for name, value in result["method_options"].items()) or "no options"
    mesh = " x ".join(f"{axis}={count}" for axis, count in result["mesh"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    cut = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    lines = [
        f"# {result['model']}: {result['method']} on {result['document_tokens']:,} tokens",
        "",
        f"{result['method']} ({options}); weights {result['weights']}, {result['dtype']}, kernels {result['kernels']}; "
        f"{result['device']}, mesh {mesh}, {result['shards']} shards; {versions}.",
        "",
        cut(header),
        "|" + "---|" * len(header),
        *map(cut, rows),
        *(line for sentence in receipts(result) for line in ("", sentence)),
        "",
        f"Ground truth: {result['ground_truth'] or 'none (not a needle)'}",
        "",
        f"Prediction: {result['prediction']}",
    ]
    return "\n".join(lines) + "\n"


__all__ = [
    "StageBar",
    "closing_table",
    "figures",
    "layout_picture",
    "markdown",
    "receipts",
    "result_table",
    "size",
    "tokens",
]
