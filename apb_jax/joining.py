"""How a process joins a run of several; imports nothing heavy, for command lines that only look at it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from apb_jax.errors import UserError
from apb_jax.typed import check_types

HEARTBEAT_S = 30
"""After so many seconds without a sign of life from one process of several the others end."""


@dataclass(frozen=True)
class Joining:
    """How this process joins a run of several: as the command line says, or as SLURM or mpirun started it."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        given = (self.coordinator, self.processes, self.process)
        if all(value is None for value in given):
            return
        if any(value is None for value in given):
            raise UserError("--coordinator HOST:PORT, --processes N and --process I must be given together")
        assert self.coordinator is not None
        assert self.processes is not None
        assert self.process is not None
        if not re.fullmatch(r"[^\s:]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", self.coordinator):
            raise UserError(f"--coordinator is {self.coordinator!r}; it must be HOST:PORT, for example 10.0.0.1:1234")
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"--process is {self.process}; it must lie in 0..{self.processes - 1} (--processes {self.processes})"
            )

    @property
    def count(self) -> int:
        """Processes of the run."""
        return self.processes or launched()

    def start(self) -> None:
        """Join (``jax.distributed``); nothing where there is one process. On CPU the processes talk through gloo.

        Where one dies, the others end within HEARTBEAT_S.
        """
        if self.count == 1 and self.coordinator is None:
            return
        import jax

        try:
            jax.distributed.initialize(
                self.coordinator, self.processes, self.process, heartbeat_timeout_seconds=HEARTBEAT_S
            )
        except (RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(f"this process could not join the others at {self.coordinator}: {line}") from error


def launched() -> int:
    """Processes that SLURM (srun) or Open MPI (mpirun) started together with this one; 1 without them."""
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            return int(count)
    return 1
