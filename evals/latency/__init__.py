"""Prefill and decode times over prompt lengths."""
