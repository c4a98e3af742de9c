"""What a person sees while a run goes on: the layout as a picture, a bar over the stages, the answer as it comes."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.control import Control
from rich.live_render import LiveRender
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
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.engine import Engine
from apb_jax.prompt.stream import TextStream
from apb_jax.report import size

WIDTH = 48
STYLE = {"earlier": "yellow", "passing": "yellow", "anchor": "magenta", "block": "cyan"}
CONTROLS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {127: 0x2421}
    | dict.fromkeys(range(128, 160), 0xFFFD)
)
"""Control characters to their pictures: a document's escape sequences must not steer the terminal."""
MARKS = {"earlier": "░", "passing": "░", "anchor": "▒", "block": "█"}
PLAIN = {"earlier": ".", "passing": ".", "anchor": "=", "block": "#"}
"""The same for terminals that are not UTF-8."""
UNITS = {"prefill": "layers", "decode": "tokens", "load weights": "bytes"}


class Reflowed(LiveRender):
    """Takes back as many rows as its lines fill now: a terminal whose window became narrower has wrapped them."""

    def __init__(self, console: Console, shown: LiveRender) -> None:
        super().__init__(shown.renderable, style=shown.style, vertical_overflow=shown.vertical_overflow)
        self.console = console
        self.widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.widths = [0]
        for segment in super().__rich_console__(console, options):
            if isinstance(segment, Segment) and segment.text == "\n":
                self.widths.append(0)
            elif isinstance(segment, Segment) and not segment.is_control:
                self.widths[-1] += cell_len(segment.text)
            yield segment

    def _wrap(self) -> None:
        if self._shape is not None:
            width = max(1, self.console.width)
            self._shape = width, sum(max(1, -(-line // width)) for line in self.widths)

    def position_cursor(self) -> Control:
        self._wrap()
        return super().position_cursor()

    def restore_cursor(self) -> Control:
        self._wrap()
        return super().restore_cursor()


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
        self.progress.live._live_render = Reflowed(console, self.progress.live._live_render)
        self.tasks: dict[str, TaskID] = {}
        self.totals: dict[str, int] = {}
        self.running = False

    def __enter__(self) -> StageBar:
        self.progress.start()
        self.running = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The bar goes; a second time nothing happens (rich would print another line where there is no terminal)."""
        if self.running:
            self.running = False
            self.progress.stop()

    def restart(self, name: str) -> None:
        """Another method starts: its stages begin anew, below a line that turns until the first of them does."""
        for task in self.tasks.values():
            self.progress.remove_task(task)
        self.tasks.clear()
        self(f"start {name}", 0, 1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        new, compiles = stage not in self.tasks, stage.startswith("compile")
        for earlier, task in self.tasks.items():
            started = earlier.startswith("start ")
            if started or (not compiles and (new or earlier.startswith("compile"))):  # what runs is compiled
                self.progress.update(task, completed=self.totals[earlier])
        if new:
            self.tasks[stage] = self.progress.add_task(stage, total=total, count="")
        count = f"{size(done)} / {size(total)}" if UNITS.get(stage) == "bytes" else f"{done}/{total}"
        if stage.startswith("compile"):
            count = ""
        self.totals[stage] = total
        self.progress.update(self.tasks[stage], completed=done, total=total, count=count)


def layout_picture(layout: Layout, method: AttentionMethod, mesh: dict[str, int], *, plain: bool = False) -> Panel:
    """Every shard's keys as a bar: what came from earlier shards, the anchor, and its own block.

    The bars of all methods have one scale: WIDTH characters are the whole document, which full attention's last shard
    sees. The kinds differ without colours too; ``plain``: in ASCII.
    """
    block, document = int(layout.block_rows[0]), int(layout.document_tokens[0])
    marks = PLAIN if plain else MARKS
    lines = []
    for shard in range(layout.shards):
        first, last = (min(place, document) for place in (shard * block, (shard + 1) * block))
        keys = method.visible_keys(layout, shard) | {"block": last - first}  # without the last block's padding
        bar = Text(f"shard {shard:>2} ")
        for name, count in keys.items():
            if count and first < last:
                shown = min(WIDTH, max(1, round(WIDTH * count / document)))
                bar.append(marks.get(name, marks["block"]) * shown, style=STYLE.get(name, "blue"))
        lines.append(bar.append(f"  {first:,}..{last:,}" if first < last else "  nothing", style="dim"))
    shown_kinds = method.visible_keys(layout, layout.shards - 1)
    passed = shown_kinds.get("passing", 0) // max(1, layout.shards - 1)
    words = {
        "earlier": "all earlier blocks",
        "passing": f"passing: {passed:,} of each earlier shard, per KV head",
        "block": f"own block: {min(block, document):,}, causally",
    }
    seen = "the keys among which the method selects:" if method.can.selects else "the keys that a block's rows see:"
    lines.append(Text(f"{seen} ({WIDTH} characters: the whole document)", style="dim"))
    for name, count in shown_kinds.items():
        if count:
            mark = marks.get(name, marks["block"])
            line = Text(f" {mark} ", style=STYLE.get(name, "blue"))
            lines.append(line.append(words.get(name, f"{name}: {count:,}"), "dim"))
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


def write(console: Console, text: str) -> None:
    """A model's text, every character of it: rich would expand tabs, drop controls and read emoji codes."""
    if not console.quiet:
        console.file.write(text.translate(CONTROLS))
        console.file.flush()


class AnswerStream:
    """Shows an answer as its tokens arrive; the pieces joined are the answer's text."""

    def __init__(self, console: Console, engine: Engine, bar: StageBar) -> None:
        self.console, self.engine, self.bar = console, engine, bar
        self.text = None if engine.codec is None else TextStream(engine.codec)
        self.begun = self.answered = False

    def _begin(self) -> None:
        """The bar goes, the answer comes."""
        if not self.begun:
            self.begun = True
            self.bar.stop()
            self.engine.listen(None)
            self.console.print("[bold green]answer[/] ", end="")

    def _show(self, text: str) -> None:
        write(self.console, text)

    def __call__(self, request: int, fresh: list[int]) -> None:
        self._begin()
        self.answered = True
        self._show(self.text.push(fresh) if self.text else "".join(f"{token} " for token in fresh))

    def end(self, finish_reason: str) -> None:
        """The rest, and why the answer ended where that is not plain."""
        self._begin()
        self._show(self.text.end() if self.text else "")
        if not self.answered:
            self.console.print("(nothing: the model ended its answer at once)", style="dim", end="")
        elif finish_reason == "length":
            self.console.print(" [dim](cut: --max-new-tokens reached)[/]", end="")
        self.console.print()
