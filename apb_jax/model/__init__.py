"""The models: configuration, weights, layers, transformer. Flax (nnx) lives here only."""
