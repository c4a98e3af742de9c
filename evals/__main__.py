"""``python -m evals``: the benchmarks on apb_jax; ``lm_eval`` hands over to lm-evaluation-harness."""

import sys
from collections.abc import Sequence

from evals.base import EvalError
from evals.cli import main
from evals.system import connect


def run(argv: Sequence[str]) -> int:
    """Run one command; 0 on success, 2 on wrong input."""
    if argv[:1] == ["lm_eval"]:
        try:
            from evals.lm_eval_adapter import main as harness
        except EvalError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return harness(argv[1:])
    return main(argv, connect=connect)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
