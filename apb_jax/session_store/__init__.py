"""Sessions on disk: documents that were prefilled once and are asked again later, on any number of shards."""

from apb_jax.session_store.folders import kept, prune, remove
from apb_jax.session_store.manifest import Manifest, read_manifest
from apb_jax.session_store.reader import load, load_steps, read_beside, read_documents
from apb_jax.session_store.writer import save

__all__ = [
    "Manifest",
    "kept",
    "load",
    "load_steps",
    "prune",
    "read_beside",
    "read_documents",
    "read_manifest",
    "remove",
    "save",
]
