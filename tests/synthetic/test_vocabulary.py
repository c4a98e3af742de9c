"""The held-out words are those that the packaged model's training never saw in a key."""

from __future__ import annotations

from hashlib import sha256

from apb_jax.synthetic.vocabulary import vocabulary


def test_held_out_words_stay_held_out() -> None:
    """One word more or less in a list moves every tenth one: then scores on "unseen" keys would be of seen ones."""
    words = vocabulary(held_out=True)
    assert (len(words.adjectives), len(words.nouns)) == (91, 668)
    assert words.nouns[:3] == ("aardvark", "absence", "accessory")
    digests = [sha256(" ".join(part).encode()).hexdigest()[:16] for part in (words.adjectives, words.nouns)]
    assert digests == ["850908c9f112103e", "3326023f46d97515"]
    seen = vocabulary(held_out=False)
    assert not {*words.nouns} & {*seen.nouns}
    assert not {*words.adjectives} & {*seen.adjectives}
