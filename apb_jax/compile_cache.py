"""The persistent compilation cache: a second run of the same shapes does not compile again."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def cache_folder() -> Path | None:
    """~/.cache/apb_jax, or below $XDG_CACHE_HOME; None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry in the passwd file
        return None
    return Path(base) / "apb_jax"


def use_compile_cache() -> Path | None:
    """Switch JAX's persistent cache on, in ``cache_folder`` unless JAX was told of a place.

    The environment variable ``APB_JAX_CACHE=off`` declines.

    Returns the folder, or None where it stays off.
    """
    if os.environ.get("APB_JAX_CACHE") == "off":
        return None
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder()
        if folder is None:
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return Path(jax.config.values["jax_compilation_cache_dir"])
