"""Documents of many lengths share a few programs, and budgets do not follow the exact length."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import ids, random_model

import apb_jax
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import bucket, granules, surely
from apb_jax.attention.method import Setup
from apb_jax.attention.registry import MethodSpec, resolve


@pytest.mark.parametrize("shortest", [33, 64, 100, 209, 731, 1000, 11_700, 65_521])
def test_a_factor_of_two_meets_four_lengths(shortest: int) -> None:
    assert len({(bucket(n), surely(n)) for n in range(shortest, 2 * shortest + 1)}) <= 4


def test_granules() -> None:
    sizes = [size for size, _ in zip(granules(), range(40), strict=False)]
    assert all(size % 32 == 0 for size in sizes)
    assert all(n in sizes for n in (1024, 16384, 65536)), "powers of two are among them"
    assert all(n in sizes for n in (1536, 49152, 98304)), "and one and a half times these: 384K on 8 shards"
    assert all(b / a <= 4 / 3 for a, b in itertools.pairwise(sizes[6:]))
    for rows in (1, 31, 32, 33, 97, 1009, 16380):
        assert bucket(rows) in sizes
        assert surely(rows) <= rows <= bucket(rows)
        assert bucket(surely(rows)) == bucket(rows)


@pytest.mark.parametrize("name", ["apb", "ring", "star", "spava"])
def test_sixty_four_lengths_compile_at_most_four_prefills(name: str) -> None:
    """11.7K to 16K tokens on 8 shards, a model without budgets of its own: programs are counted."""
    model, rng = random_model(max_positions=20_000), np.random.default_rng(0)
    keys = set()
    for tokens in rng.integers(11_700, 16_001, 64):
        query = np.arange(int(rng.integers(5, 30)), dtype=np.int32)
        prompt = Prompt(np.zeros(tokens, np.int32), query, query)
        setup = Setup(model.config, "random", 8, 8, has_heads=True, query_at=3, prompts=(prompt,))
        method, _ = resolve(MethodSpec(name), setup)
        assert method.name == name
        layout = method.layout([prompt], 8)
        keys.add((method, layout.segments, layout.tokens.shape, layout.kept_capacity))
    assert len(keys) <= 4, sorted(map(str, keys))


def test_compiled_programs_are_as_many() -> None:
    """The same on a small scale with real programs: 16 documents of 280 to 540 tokens on 4 shards."""
    model, rng = random_model(), np.random.default_rng(1)
    engine = apb_jax.Engine(model, "apb", apb_jax.make_mesh(sp=4))
    for tokens in rng.integers(280, 541, 16):
        engine.prefill([engine.prompt(ids(1, int(tokens)), ids(2, 6))])
    assert engine.programs.count("prefill") <= 4


def test_an_engine_keeps_so_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one used longest ago goes first; what is kept of its size goes with it."""
    monkeypatch.setattr(apb_jax.programs, "KEPT_PROGRAMS", 3)
    monkeypatch.setattr(apb_jax.programs, "program_bytes", lambda program: 1)
    programs = apb_jax.Engine(random_model(), "full", apb_jax.make_mesh(sp=1)).programs
    made = []

    def run(number: int) -> int:
        def compiled(make: object, args: object, options: object) -> object:
            made.append(number)
            return (lambda *given: number), {}

        monkeypatch.setattr(apb_jax.programs, "compiled", compiled)
        return programs.call("any", number, lambda: None, ())

    assert [run(number) for number in (1, 2, 3, 1, 4, 1, 2)] == [1, 2, 3, 1, 4, 1, 2]
    assert made == [1, 2, 3, 4, 2]
    assert len(programs.compiled) == len(programs.sizes) == 3
