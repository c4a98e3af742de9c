"""``python -m apb_jax.doctor``: versions, driver, links and a self-test of this machine, one line a finding.

Exit status: 0 where nothing is broken, 1 where something is, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from apb_jax.command import Parser, command
from apb_jax.doctor.facts import Facts, probe
from apb_jax.doctor.findings import Finding, examine
from apb_jax.measure.devices import DeviceFigures, figures_of

SelfTest = Callable[[DeviceFigures | None], list[Finding]]


def findings(facts: Facts, test: SelfTest | None) -> list[Finding]:
    """Those of the facts, then those of the self-test; None: it is left out."""
    found = examine(facts)
    if test is None:
        return found
    expected = figures_of(facts.device_kinds[0]) if facts.platform == "gpu" else None
    if facts.platform == "gpu" and expected is None:
        text = f"no measured figures of {facts.device_kinds[0]}"
        found.append(Finding("unchecked", "speed", text, "python -m apb_jax.calibrate measures methods here"))
    return found + test(expected)


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m apb_jax.doctor``."""
    parser = Parser(prog="python -m apb_jax.doctor", description=__doc__)
    parser.add_argument("--no-self-test", action="store_true", help="look only; run nothing on the devices")
    return parser


def doctor(facts: Facts, test: SelfTest | None) -> int:
    """Print what was found; 1 where something is broken, else 0."""
    found = findings(facts, test)
    for finding in found:
        print(finding)
    broken = sum(finding.level == "broken" for finding in found)
    print("nothing is broken" if not broken else f"{broken} broken: do what these lines say, then run this again")
    return 1 if broken else 0


@command("python -m apb_jax.doctor")
def main(argv: list[str]) -> int:
    """Look at this machine, and test it unless asked not to."""
    args = make_parser().parse_args(argv)
    from apb_jax.doctor.selftest import self_test
    from apb_jax.mesh import has_accelerator, reserve_memory

    if has_accelerator():
        reserve_memory()  # as a run does, so that it is what a run would have
    return doctor(probe(), None if args.no_self_test else self_test)


if __name__ == "__main__":
    sys.exit(main())
