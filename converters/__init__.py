"""Checkpoints in and out: HF folders and retaining heads, our orbax folders, and back. ``python -m converters``."""

import apb_jax  # noqa: F401 - its loader imports our modules: whoever imports them first, it starts there
