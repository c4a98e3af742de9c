"""Perplexity of long text under each method's prefill."""
