"""Needle in a haystack: a heat map over length and depth, and STRING's four needles."""
