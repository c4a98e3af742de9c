"""Samples prepared while the device works: an iterator that another thread keeps a few items ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items in their order, ``count`` of them prepared in advance; what preparing one raises is raised here."""
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="samples") as pool:
        pending: deque[Future[Any]] = deque(pool.submit(next, source, _END) for _ in range(count))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(pool.submit(next, source, _END))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
