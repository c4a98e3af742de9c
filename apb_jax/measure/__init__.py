"""Measuring runs: calibration, automatic choice, traffic, recovered mass, receipts. The engine imports none of it."""
