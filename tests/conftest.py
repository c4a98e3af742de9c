"""Eight simulated CPU devices, strict dtype promotion, warnings as errors: set before JAX initialises."""

import gc
import os
import tempfile
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


@pytest.fixture(scope="session", autouse=True)
def compile_cache() -> Iterator[None]:
    """Many tests build the same small programs: each is compiled once a process. Not for the processes tests start."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def fresh_programs() -> Iterator[None]:
    """Compiled programs go after each file: thousands of them exhaust the memory maps that a process may have."""
    yield
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # engines refer to themselves: without it they keep their programs
