"""Things that are made when they are first asked for, and let go when many others were asked for since."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """`count` things; number n is `make(n)`, called on first use. The `limit` used last are kept."""

    def __init__(self, count: int, make: Callable[[int], T], limit: int) -> None:
        self._count = count
        self._make = functools.lru_cache(maxsize=limit)(make)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[T]: ...
    def __getitem__(self, number: int | slice) -> T | Sequence[T]:
        if isinstance(number, slice):
            raise TypeError("things made one by one have no slices")
        if not -self._count <= number < self._count:
            raise IndexError(number)
        return self._make(int(number) % self._count)


def open_files() -> int:
    """How many files this process may hold open, as far as it matters here: between 64 and 1,024."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else min(max(soft, 64), 1024)
