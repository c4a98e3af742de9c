"""Text to token ids and back: chat templates, document and question, stop words, streaming text."""
