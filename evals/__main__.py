"""``python -m evals``: the benchmarks on apb_jax; ``lm_eval`` hands over to lm-evaluation-harness."""

import sys
from collections.abc import Sequence

from apb_jax.command import command
from evals.cli import main
from evals.system import connect


def run(argv: Sequence[str]) -> int:
    """Run one command; 0 on success, 2 on wrong input."""
    if argv[:1] == ["lm_eval"]:
        return harness(argv[1:])
    return main(argv, connect=connect)


@command("python -m evals lm_eval")
def harness(argv: list[str]) -> int:
    """lm-evaluation-harness with its own command line."""
    from evals.lm_eval_adapter import main as of_the_harness

    return of_the_harness(argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
