"""Eight simulated CPU devices, strict dtype promotion, warnings as errors: set before JAX initialises."""

import gc
import os
import warnings
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":  # Triton's own functions are made at its first import, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Optimising tiny programs costs more than running them unoptimised.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax  # noqa: E402 - after the flags
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def fresh_programs() -> Iterator[None]:
    """Compiled programs go after each file: thousands of them exhaust the memory maps that a process may have."""
    yield
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # engines refer to themselves: without it they keep their programs
