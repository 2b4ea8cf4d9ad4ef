"""`Packed`: sequences of different lengths laid end to end, the noun that flows through every model here.

Padding wastes what it fills: the reference pads 45% of its video positions and 34% of its text positions. A packed
batch has none; linear layers see one long matrix, attention sees runs of sequences of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from videoclip.errors import InputError


@dataclass(frozen=True)
class Packed:
    """B sequences end to end.

    `rows`: [N, …], the elements of the first sequence, then of the second, …; `lengths`: int64 [B], on the CPU,
    their sum is N. `places`: int64 [N], on the CPU: the position of every row in its own sequence where that is not
    simply 0, 1, 2, … (after `keep`); else None.
    Raises ValueError if lengths and rows do not add up.
    """

    rows: Tensor
    lengths: Tensor
    places: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or int(self.lengths.sum()) != len(self.rows):
            raise ValueError(f"lengths add up to {int(self.lengths.sum())} but there are {len(self.rows)} rows")
        object.__setattr__(self, "lengths", self.lengths.to("cpu", torch.int64))

    def __len__(self) -> int:
        """Number of sequences, B."""
        return len(self.lengths)

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> Packed:
        """Lay tensors [T, …] end to end; at least one."""
        return cls(torch.cat(list(sequences)), torch.tensor([len(sequence) for sequence in sequences]))

    @classmethod
    def together(cls, parts: Sequence[Packed]) -> Packed:
        """All sequences of several, one after the other; at least one part."""
        places = None
        if any(part.places is not None for part in parts):
            places = torch.cat([part.positions for part in parts])
        return cls(torch.cat([part.rows for part in parts]), torch.cat([part.lengths for part in parts]), places)

    @classmethod
    def from_padded(cls, x: Tensor, mask: Tensor) -> Packed:
        """Padded [B, T, …] and mask [B, T] (true where there is something) -> the rows under the mask."""
        mask = mask.bool()
        return cls(x[mask], mask.sum(1))

    @cached_property
    def starts(self) -> Tensor:
        """int64 [B], on the CPU: the first row of every sequence."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @cached_property
    def positions(self) -> Tensor:
        """int64 [N], on the CPU: the position of every row in its own sequence, also after rows were dropped."""
        if self.places is not None:
            return self.places
        return torch.arange(len(self.rows)) - torch.repeat_interleave(self.starts, self.lengths)

    @cached_property
    def owners(self) -> Tensor:
        """int64 [N], on the CPU: the sequence that every row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(how many, their length) of neighbouring sequences of equal length."""
        values, counts = torch.unique_consecutive(self.lengths, return_counts=True)
        return list(zip(counts.tolist(), values.tolist()))

    def bounds(self, device: torch.device) -> tuple[Tensor, int]:
        """Where sequences begin and end, int32 [B + 1] on `device`, and the longest's length; 0 of no sequence."""
        known: dict[torch.device, Tensor] = self.__dict__.setdefault("_bounds", {})
        if device not in known:
            known[device] = to_device(torch.nn.functional.pad(torch.cumsum(self.lengths, 0), (1, 0)).int(), device)
        return known[device], int(self.lengths.max()) if len(self) else 0

    def with_rows(self, rows: Tensor) -> Packed:
        """The same sequences with other contents [N, …], such as a layer's outputs."""
        other = Packed(rows, self.lengths, self.places)
        for name in _OF_LENGTHS & self.__dict__.keys():  # what follows from the lengths need not be found again
            other.__dict__[name] = self.__dict__[name]
        return other

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Packed:
        """The same with its rows on another device, or of another type. Lengths stay on the CPU."""
        return self.with_rows(self.rows.to(device, dtype))

    def split(self) -> tuple[Tensor, ...]:
        """Every sequence [T, …] by itself, views of the rows."""
        return self.rows.split(self.lengths.tolist())

    def by_run(self) -> list[Tensor]:
        """Runs of sequences of equal length as views [count, length, …].

        Made by one `split`, whose gradient is one concatenation; slices would each cost a zero gradient of full size.
        """
        pieces = self.rows.split([count * length for count, length in self.runs])
        return [piece.unflatten(0, run) for piece, run in zip(pieces, self.runs)]

    def parts(self, size: int) -> list[Packed]:
        """The same sequences, in order, at most `size` in each part; views of the rows."""
        parts, row = [], 0
        for lengths in self.lengths.split(size):
            rows = slice(row, row + int(lengths.sum()))
            parts.append(Packed(self.rows[rows], lengths, None if self.places is None else self.places[rows]))
            row = rows.stop
        return parts

    def take(self, order: Tensor) -> Packed:
        """Some of the sequences, in another order: `order` int64, their numbers."""
        lengths = self.lengths[order]
        source = torch.repeat_interleave(self.starts[order], lengths) + positions_in_sequence(lengths)
        places = None if self.places is None else self.places[source]
        return Packed(self.rows[to_device(source, self.rows.device)], lengths, places)

    def by_length(self) -> tuple[Packed, Tensor]:
        """Shortest sequence first, so that `runs` are long; and the number each sequence had before, int64 [B]."""
        order = torch.sort(self.lengths, stable=True).indices
        return self.take(order), order

    def cat(self, other: Packed) -> Packed:
        """Every sequence of this, followed by the same one of `other`; positions go on counting."""
        if len(self) != len(other):
            raise ValueError(f"{len(self)} sequences cannot be joined to {len(other)}")
        both = torch.cat([self.rows, other.rows])
        lengths = torch.stack([self.lengths, other.lengths], 1).ravel()  # in turn: this, other, this, …
        starts = torch.stack([self.starts, other.starts + len(self.rows)], 1).ravel()
        source = torch.repeat_interleave(starts, lengths) + positions_in_sequence(lengths)
        places = None
        if self.places is not None or other.places is not None:
            after = self._ends()[other.owners] + other.positions
            places = torch.cat([self.positions, after])[source]
        return Packed(both[to_device(source, both.device)], self.lengths + other.lengths, places)

    def wrapped(self, cls: Tensor, sep: Tensor) -> Packed:
        """`cls` [1, …] before and `sep` [1, …] after every sequence; what was at position p is at p + 1."""
        lengths = self.lengths + 2
        first = torch.cumsum(lengths, 0) - lengths
        source = torch.full((int(lengths.sum()),), len(self.rows))  # [CLS], unless overwritten
        inner = torch.repeat_interleave(first + 1, self.lengths) + positions_in_sequence(self.lengths)
        source[inner] = torch.arange(len(self.rows))
        source[first + lengths - 1] = len(self.rows) + 1
        rows = torch.cat([self.rows, cls, sep])[to_device(source, self.rows.device)]
        if self.places is None:
            return Packed(rows, lengths)
        places = torch.zeros(len(rows), dtype=torch.int64)
        places[inner] = self.places + 1
        places[first + lengths - 1] = self._ends() + 1
        return Packed(rows, lengths, places)

    def keep(self, mask: Tensor) -> Packed:
        """Only the rows under `mask`, bool [N]; those that stay keep their positions.

        Raises InputError if a sequence would lose all of its rows.
        """
        mask = mask.cpu()
        lengths = torch.zeros_like(self.lengths).index_add_(0, self.owners[mask], torch.ones(int(mask.sum())).long())
        if len(lengths) and int(lengths.min()) < 1:
            raise InputError(
                f"nothing of sequence {int(lengths.argmin())} would be kept; keep at least one row of each"
            )
        return Packed(self.rows[mask.to(self.rows.device)], lengths, self.positions[mask])

    def padded(self, value: float = 0) -> tuple[Tensor, Tensor]:
        """[B, T, …] with `value` where a sequence has ended, and the mask, bool [B, T], on the device of the rows."""
        longest = int(self.lengths.max()) if len(self) else 0
        mask = (torch.arange(longest) < self.lengths[:, None]).to(self.rows.device)
        padded = self.rows.new_full((len(self), longest, *self.rows.shape[1:]), value)
        padded[mask] = self.rows
        return padded, mask

    def _ends(self) -> Tensor:
        """int64 [B]: the position behind the last row of every sequence."""
        if self.places is None:
            return self.lengths
        return self.places[self.starts + self.lengths - 1] + 1


_OF_LENGTHS = frozenset({"starts", "positions", "owners", "runs", "_bounds"})


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Row numbers, made on the CPU, where the rows are. From pinned memory: any other copy would wait for the GPU."""
    if device.type == "cuda" and not numbers.is_cuda:
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def positions_in_sequence(lengths: Tensor) -> Tensor:
    """0, 1, …, n - 1 for each n of `lengths`, end to end: int64 [sum of lengths]."""
    return torch.arange(int(lengths.sum())) - torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
