"""Where a document's keys and values are kept: the words of ``--kv``, readable without JAX."""

DEVICE, HOST = PLACES = ("device", "host")
NOWHERE = "nowhere"
"""No choice of a run: a prefill that is timed alone keeps none (``measure/prefill_alone.py``)."""
