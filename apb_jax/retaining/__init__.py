"""Retaining heads: which tokens of a block later shards should see."""
