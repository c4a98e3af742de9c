"""The packaged tiny model: checkpoint, tokenizer, retaining heads, and the programs that made and measured them."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
"""The HF-format checkpoint folder."""

QUERY_AT = 1
"""Index at which APB embeds the query in the anchor: right after the beginning-of-text token."""
