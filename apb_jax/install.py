"""How to install what is missing, in a command that works where this package lives."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def install_hint(extra: str) -> str:
    """The pip command for an extra of this package: of the clone that it runs from, else of the installed package."""
    if (ROOT / "pyproject.toml").is_file():
        return f"pip install -e '{ROOT}[{extra}]'"
    return f"pip install 'apb-jax[{extra}]'"
