"""Several processes run one evaluation: the first one reads, scores and writes; the others do its device work.

Every call of the first process that uses the mesh is told to the others before it runs, so that all of them enter the
same programs with the same ids. A run that is resumed, or that reads data that only the first machine has, needs no
more than that.
"""

import atexit
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from apb_jax.errors import UserError

Call = dict[str, Any]
"""What is to be done, as JSON: names, numbers and lists of ids."""
END: Call = {"end": True}


def send(call: Call) -> None:
    """Tell the other processes; nothing where there are none, and nothing from one that is told itself."""
    if jax.process_count() > 1 and jax.process_index() == 0:
        _exchange(call)


def lead() -> None:
    """The others are told when this process ends, also where it ends in an error."""
    if jax.process_count() > 1:
        atexit.register(send, END)


def follow(run: Callable[[Call], Any]) -> None:
    """Do what the first process sends until it ends. What is refused there is refused here too, and said there."""
    while (call := _exchange(None)) != END:
        try:
            run(call)
        except UserError:
            continue


def _exchange(call: Call | None) -> Call:
    """The first process's call, in every process; the others give None."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.frombuffer(json.dumps(call).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(data))))
    text = np.zeros(size, np.uint8)
    text[: len(data[:size])] = data[:size]
    found = np.asarray(broadcast_one_to_all(text), np.uint8)
    told: Call = json.loads(found.tobytes())
    return told
