"""A report as blocks, written as Markdown and as one HTML page that needs no network."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.tables import Table

_CSS = """
:root { --ink:#1c2128; --soft:#5b6470; --line:#e3e6ea; --paper:#ffffff; --shade:#f6f7f9; --accent:#0072b2; }
* { box-sizing:border-box; }
body { margin:0; background:var(--shade); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
header { background:linear-gradient(120deg,#0b2540,#0072b2 75%,#009e73); color:#fff; padding:44px 24px 36px; }
header>div, main { max-width:1080px; margin:0 auto; }
header h1 { margin:0 0 6px; font-size:32px; letter-spacing:-.5px; }
header p { margin:0; color:#fff; opacity:.88; }
nav { margin-top:18px; display:flex; flex-wrap:wrap; gap:8px; }
nav a { color:#fff; text-decoration:none; border:1px solid rgba(255,255,255,.45); border-radius:99px; padding:3px 14px;
  font-size:14px; }
main { padding:24px 16px 60px; }
section { background:var(--paper); border:1px solid var(--line); border-radius:14px; padding:26px 30px 30px;
  margin:0 0 24px; box-shadow:0 1px 3px rgba(16,24,40,.05); }
h2 { margin:0 0 8px; font-size:23px; letter-spacing:-.3px; }
h3 { margin:26px 0 8px; font-size:16px; color:var(--soft); font-weight:600; }
p { margin:8px 0; color:#30373f; }
img { display:block; max-width:100%; height:auto; margin:18px auto; background:#fff; }
.wide { overflow-x:auto; }
table { border-collapse:separate; border-spacing:0; margin:12px 0; font-size:14px; font-variant-numeric:tabular-nums; }
th { text-align:right; color:var(--soft); font-weight:600; border-bottom:2px solid var(--line); padding:7px 12px;
  white-space:nowrap; }
td { text-align:right; padding:6px 12px; border-bottom:1px solid var(--line); white-space:nowrap; }
th:first-child { text-align:left; font-weight:600; }
td.words { text-align:left; white-space:normal; min-width:min(420px,60vw); }
td.shaded { color:#1c2128; }
tbody th { color:var(--ink); border-bottom:1px solid var(--line); padding:6px 12px; }
th:first-child { position:sticky; left:0; background:var(--paper); border-right:1px solid var(--line); }
.hint { display:none; color:var(--soft); font-size:13px; margin:0 0 4px; }
.wide { scrollbar-color:var(--soft) var(--line); }
.wide::-webkit-scrollbar { height:10px; }
.wide::-webkit-scrollbar-track { background:var(--line); border-radius:5px; }
.wide::-webkit-scrollbar-thumb { background:var(--soft); border-radius:5px; }
@media (max-width:700px) { .hint { display:block; } section { padding:18px 14px 20px; }
  header h1 { font-size:24px; overflow-wrap:anywhere; } h2 { overflow-wrap:anywhere; }
  th:first-child { white-space:normal; overflow-wrap:break-word; min-width:96px; max-width:150px; } }
@media (prefers-color-scheme:dark) { :root { color-scheme:dark; --ink:#e6e9ed; --soft:#a3acb8; --line:#363d47;
  --paper:#1b2027; --shade:#12161b; --accent:#6cb8f0; } p { color:#cfd5dc; } img { border-radius:10px; padding:8px; } }
details { margin-top:16px; } summary { cursor:pointer; color:var(--accent); font-weight:600; }
pre { background:var(--shade); border:1px solid var(--line); border-radius:8px; padding:12px; overflow-x:auto;
  font-size:12.5px; line-height:1.45; }
footer { color:var(--soft); font-size:13px; text-align:center; padding-bottom:30px; }
@media print { .hint { display:none; } body { background:#fff; } section { box-shadow:none; break-inside:avoid; } }
"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


@dataclass(frozen=True)
class Details:
    """Text that is folded away on the page."""

    summary: str
    text: str


Block = Heading | Paragraph | Picture | Details | Table


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def to_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    parts = [f"# {escape(title)}", escape(lead)]
    for section in sections:
        parts.append(f"## {escape(section.title)}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no cell, link, tag or emphasis begins or ends in it."""
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"### {escape(text)}"
        case Paragraph(text):
            return escape(text)
        case Picture(path, caption):
            return f"![{escape(caption)}]({path.name})"
        case Details(summary, text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"<details><summary>{html.escape(summary)}</summary>\n\n{fence}\n{text}\n{fence}\n\n</details>"
    align = ["---", *["---:"] * (len(block.header) - 1)]
    rows = [tuple(map(escape, block.header)), tuple(align), *(tuple(map(escape, row)) for row in block.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def to_html(title: str, lead: str, sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{html.escape(s.title)}</h2>{"".join(map(_html, s.blocks))}</section>'
        for i, s in enumerate(sections)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_CSS}</style></head><body>'
        f"<header><div><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p><nav>{links}</nav></div></header>"
        f"<main>{body}</main><footer>Made with apb_jax: python -m evals report</footer></body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h3>{html.escape(text)}</h3>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        case Details(summary, text):
            return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in block.header)
    rows = []
    for i, row in enumerate(block.rows):
        cells = []
        for j, cell in enumerate(row):
            shade = block.shades.get((i, j))
            style = f' style="background:{_shade(shade)}"' if shade is not None else ""
            if not j:
                cells.append(f'<th scope="row">{html.escape(cell)}</th>')
                continue
            kind = "words" if len(cell) > 40 else "shaded" if shade is not None else ""
            cells.append(f'<td class="{kind}"{style}>{html.escape(cell)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    hint = '<p class="hint">The table scrolls sideways →</p>' if len(block.header) > 3 else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'{hint}<div class="wide" tabindex="0" role="region" aria-label="table">{table}</div>'


def _shade(value: float) -> str:
    """Pale red over pale yellow to pale green."""
    low, middle, high = (252, 216, 223), (253, 240, 205), (206, 246, 232)
    start, end, part = (low, middle, value * 2) if value < 0.5 else (middle, high, value * 2 - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return f"rgb({red},{green},{blue})"
