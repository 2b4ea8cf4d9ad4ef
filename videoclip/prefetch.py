"""Batches drawn by a thread while the step before is computed, and brought to a GPU beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from videoclip.packed import Packed

Batch = TypeVar("Batch")


def prefetch(
    draw: Callable[[int], Batch], count: int, first: int = 0, device: torch.device | None = None
) -> Iterator[Batch]:
    """Yield `draw(first)`, …, `draw(count - 1)`, each drawn by a thread while the one before it is used.

    With a CUDA `device` the thread also copies them there, on a stream of its own, from pinned memory.
    """
    fetch = _Fetch(draw, device)
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(fetch, place) for place in range(first, min(first + 1, count))]
        for place in range(first, count):
            batch, ready = waiting.pop().result()
            if place + 1 < count:
                waiting.append(thread.submit(fetch, place + 1))
            if ready is not None:
                ready(batch)
            yield batch


class _Fetch:
    """Draws and, for a GPU, starts the copy; returns with the batch what makes the present stream wait for it."""

    def __init__(self, draw: Callable[[int], Any], device: torch.device | None) -> None:
        self.draw = draw
        self.device = device if device is not None and device.type == "cuda" else None
        self._stream = torch.cuda.Stream(self.device) if self.device else None

    def __call__(self, place: int) -> tuple[Any, Callable[[Any], None] | None]:
        batch = self.draw(place)
        if self.device is None or self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            batch = tensors_mapped(batch, lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))
            copied = self._stream.record_event()

        def wait(of_batch: Any) -> None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)

            def in_use(tensor: Tensor) -> Tensor:
                tensor.record_stream(stream)  # its memory is not given to the next copy before this stream is done
                return tensor

            tensors_mapped(of_batch, in_use)

        return batch, wait


def tensors_mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch (a dataclass, a `Packed`, a dictionary, list or tuple) with `function` of every tensor in it.

    Lengths and places of a `Packed` stay as they are: they belong to the CPU.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Packed):
        return value.with_rows(function(value.rows))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {item.name: tensors_mapped(getattr(value, item.name), function) for item in fields(value)}
        return replace(value, **changed)
    if isinstance(value, dict):
        return {name: tensors_mapped(item, function) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, Packed)) for item in value):
        return type(value)(tensors_mapped(item, function) for item in value)
    return value
