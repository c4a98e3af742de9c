"""Counts the kernels that were only lowered because no GPU was there to run them."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not: for attention_cases


def pytest_configure(config):
    config.addinivalue_line("markers", "lowered_only: lowers a GPU kernel for CUDA without running it")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    lowered = [report for report in terminalreporter.stats.get("passed", []) if "lowered_only" in report.keywords]
    if lowered:
        terminalreporter.write_line(
            f"GPU kernels: {len(lowered)} variants lowered for CUDA only, not run (JAX {jax.__version__})"
        )
