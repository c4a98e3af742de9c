"""InfiniteBench: twelve tasks of 100K tokens and more, with the official prompts and scorers and the forks' own."""
