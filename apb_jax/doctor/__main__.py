"""``python -m apb_jax.doctor``: versions, driver, links and a self-test of this machine, one line a finding.

Exit status: 0 where nothing is broken, 1 where something is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

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


def main(argv: list[str] | None = None, look: Callable[[], Facts] = probe, test: SelfTest | None = None) -> int:
    """Print what was found; ``look`` and ``test``: where facts and self-test come from."""
    parser = argparse.ArgumentParser(prog="python -m apb_jax.doctor", description=__doc__)
    parser.add_argument("--no-self-test", action="store_true", help="look only; run nothing on the devices")
    args = parser.parse_args(argv)
    from apb_jax.doctor.selftest import self_test
    from apb_jax.mesh import has_accelerator, reserve_memory

    if has_accelerator():
        reserve_memory()  # as a run does, so that it is what a run would have
    found = findings(look(), None if args.no_self_test else test or self_test)
    for finding in found:
        print(finding)
    broken = sum(finding.level == "broken" for finding in found)
    print("nothing is broken" if not broken else f"{broken} broken: do what these lines say, then run this again")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
