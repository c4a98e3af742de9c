"""The order of the house: arrows between files go one way, no circles, nothing too long or too wide."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGES = ("apb_jax", "pallas_kernels", "converters", "evals")
ORDER = [
    ("pallas_kernels",),
    (
        "apb_jax.errors",
        "apb_jax.json_text",
        "apb_jax.typed",
        "apb_jax.precision",
        "apb_jax.kv_memory",
        "apb_jax.files",
        "apb_jax.arguments",
        "apb_jax.command",
        "apb_jax.joining",
        "apb_jax.host_memory",
        "apb_jax.mesh",
        "apb_jax.rope",
        "apb_jax.compile_cache",
        "apb_jax.install",
    ),
    ("apb_jax.model.weights", "apb_jax.model.families", "apb_jax.model.hf_keys", "apb_jax.model.config"),
    ("apb_jax.cache", "apb_jax.kv_codes", "apb_jax.quantised_cache", "apb_jax.attention", "apb_jax.virtual"),
    ("apb_jax.model",),
    ("apb_jax.presets", "apb_jax.sampling"),
    ("apb_jax.weights", "apb_jax.programs"),
    ("apb_jax.prefill", "apb_jax.decode", "apb_jax.host_kv", "apb_jax.prompt"),
    (
        "apb_jax.engine",
        "apb_jax.ahead",
        "apb_jax.batching",
        "apb_jax.session",
        "apb_jax.generation",
        "apb_jax.session_store",
    ),
    ("apb_jax.synthetic", "apb_jax.options"),
    ("apb_jax.measure", "apb_jax.report", "apb_jax.profile", "apb_jax.screen", "apb_jax.task", "apb_jax.retaining"),
    (
        "apb_jax.tiny",
        "apb_jax.serve",
        "apb_jax.run",
        "apb_jax.run_session",
        "apb_jax.calibrate",
        "apb_jax.sessions",
        "apb_jax.plan",
        "apb_jax.doctor",
    ),
    ("apb_jax.__main__",),
    ("converters", "evals"),
]
"""From the ground up: a file may import files of its own row and of those above it in this list, nothing else."""
LONGEST_FILE = 450
WIDEST = 8
WIDE = (
    "pallas_kernels.block_sparse_attention.triton_kernel.block_sparse_rows",
    "pallas_kernels.decode_attention.mosaic_gpu._kernel",
    "pallas_kernels.decode_attention.triton_kernel._step",
    "pallas_kernels.decode_attention.triton_kernel.decode_8bit",
    "pallas_kernels.flash_attention.mosaic_gpu._kernel",
    "pallas_kernels.flash_attention.triton_kernel._attend_range",
    "pallas_kernels.flash_attention.triton_kernel.flash_attention_rows",
    "pallas_kernels.skinny_matmul.triton_kernel.skinny_e4m3",
)
"""Kernels of the GPU: one parameter for each array they read and write, and each constant; they cannot be grouped."""


def modules() -> dict[str, Path]:
    """Every module of the product by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below ``node``, without what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from statements(child)


def imports(name: str) -> set[str]:
    """Modules of the product that a module imports, also inside functions."""
    found = set()
    for node in statements(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return {one for one in found if one in MODULES and one != name}


GRAPH = {name: imports(name) for name in MODULES}


def floor(name: str) -> int | None:
    """The row of ORDER whose longest name fits; None for a package's face, which only hands on."""
    rows = [(len(part), row) for row, parts in enumerate(ORDER) for part in parts if f"{name}.".startswith(f"{part}.")]
    return max(rows)[1] if rows else None


def test_every_module_has_its_floor() -> None:
    homeless = [name for name in MODULES if floor(name) is None and name != "apb_jax"]
    assert homeless == []


@pytest.mark.parametrize("name", sorted(set(GRAPH) - {"apb_jax"}))
def test_arrows_go_down(name: str) -> None:
    """``apb_jax`` itself hands on names lazily, so an arrow to it is none."""
    here = floor(name)
    up = [other for other in GRAPH[name] - {"apb_jax"} if floor(other) > here]  # type: ignore[operator]
    assert up == []
    if name.startswith("pallas_kernels"):
        assert all(other.startswith("pallas_kernels") for other in GRAPH[name])
    if name.startswith("converters"):
        assert not any(other.startswith("evals") for other in GRAPH[name])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, packages' faces left out (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name] & set(graph):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                out.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return out


def test_no_circles() -> None:
    inner = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    assert circles({name: GRAPH[name] & inner for name in inner}) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_files_and_functions_keep_their_size() -> None:
    long = {name: path for name, path in MODULES.items() if path.read_text(encoding="utf-8").count("\n") > LONGEST_FILE}
    assert long == {}
    wide = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in given if a.arg not in ("self", "cls")]) > WIDEST:
                    wide.append(f"{name}.{node.name}")
    assert sorted(wide) == sorted(WIDE)
