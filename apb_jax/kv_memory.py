"""Where a document's keys and values are kept: the words of ``--kv``, readable without JAX."""

DEVICE, HOST = PLACES = ("device", "host")
