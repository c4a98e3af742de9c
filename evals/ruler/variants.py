"""The published programs that carry RULER's name, as data. Never mix scores of two variants in one table."""

from dataclasses import dataclass
from typing import Literal

from evals.base import require_choice


@dataclass(frozen=True)
class Variant:
    """What one RULER program does differently from the others.

    Attributes:
      sizing: ``linear`` grows the prompt step by step, ``bisect`` is the main branch's search, ``fit`` (ours)
        searches to the last unit.
      split: built for blockwise methods: document and query are separate strings of the record.
      vt_example: how the worked example of variable tracking is made: ``flat`` (R1), ``split`` (RS), ``lines`` (R2).
      cwe_frequencies: repetitions of a common and of an uncommon word.
      fwe_new_tokens: answer budget of frequent words at inference.
      fwe_reserves_answer: whether frequent words leaves room for its answer inside the length.
    """

    name: str
    source: str
    sizing: Literal["linear", "bisect", "fit"]
    split: bool = False
    corrected_spelling: bool = False
    vt_example: Literal["flat", "split", "lines"] = "flat"
    vt_retry_shrinks: bool = False
    cwe_frequencies: tuple[int, int] = (30, 3)
    cwe_separator: str = ""
    fwe_new_tokens: int = 50
    fwe_reserves_answer: bool = False
    repeats_texts: bool = False
    squad_copies: int = 1
    qa_fills_with_part: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            name="ruler_2024_06",
            source="NVIDIA/RULER commit 2fac05a; the data programs of HKUNLP/STRING and microsoft/MInference are equal",
            sizing="linear",
        ),
        Variant(
            name="star_attention",
            source="NVIDIA/Star-Attention commit c61059f; thunlp/APB equal up to 128K but for its wrappers",
            sizing="linear",
            split=True,
            vt_example="split",
            cwe_frequencies=(300, 30),
            fwe_new_tokens=120,
            squad_copies=5,
        ),
        Variant(
            name="ruler_main",
            source="NVIDIA/RULER commit c3f5e3b",
            sizing="bisect",
            corrected_spelling=True,
            vt_example="lines",
            vt_retry_shrinks=True,
            cwe_separator=" ",
            fwe_reserves_answer=True,
            repeats_texts=True,
        ),
        Variant(
            name="ruler_fit",
            source="this project: prompts of ruler_main, sized to fill the length to within a unit of text",
            sizing="fit",
            corrected_spelling=True,
            vt_example="lines",
            vt_retry_shrinks=True,
            cwe_separator=" ",
            fwe_reserves_answer=True,
            repeats_texts=True,
            qa_fills_with_part=True,
        ),
    )
}


def get_variant(name: str) -> Variant:
    return VARIANTS[require_choice("RULER variant", name, VARIANTS)]
