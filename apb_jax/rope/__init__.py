"""Rotary position embeddings: the frequency rules of the supported models, and STRING on top of them."""
