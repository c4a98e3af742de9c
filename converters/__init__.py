"""Commands over ``apb_jax.weights``: ``python -m converters {hf,heads,export,inspect}``."""
