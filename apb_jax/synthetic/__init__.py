"""Synthetic documents with a known answer: what run, the packaged model and the evaluations share."""
