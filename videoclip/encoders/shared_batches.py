"""One network for many videos at once: threads decode, clips of whatever video come next share a batch.

On a GPU the network wants batches of one size; videos end anywhere. So each decoding thread hands in its clips one by
one, a single thread fills batches with them and computes, and every thread gets the tokens of its own clips back.
Every batch has the same shape, its rest filled up with zeros: the kernels that are chosen, and with them a clip's
token, do not depend on which clips happened to share its batch. (On a CPU batches are an encoder's own,
`VideoEncoder.encode_all`.)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from videoclip.encoders.video_encoder import CLIPS_AT_ONCE_ON_GPU, VideoEncoder

PATIENCE = 0.05  # seconds that a batch waits to become full; the network is idle then anyway


class _Tokens:
    """The tokens of one video's clips, as they come back."""

    def __init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}
        self.error: BaseException | None = None
        self._condition = threading.Condition()

    def put(self, number: int, row: np.ndarray) -> None:
        with self._condition:
            self.rows[number] = row
            self._condition.notify()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self.error = error
            self._condition.notify()

    def wait(self, count: int, dimension: int) -> np.ndarray:
        with self._condition:
            self._condition.wait_for(lambda: self.error is not None or len(self.rows) == count)
        if self.error is not None:
            raise self.error
        rows = [self.rows[number] for number in range(count)]
        return np.stack(rows) if rows else np.zeros((0, dimension), np.float16)


Item = tuple[np.ndarray, int, _Tokens]


class SharedBatches:
    """`encode_all` for many threads at once. Holds at most three batches of clips; who decodes faster waits."""

    def __init__(
        self,
        encoder: VideoEncoder,
        size: int = CLIPS_AT_ONCE_ON_GPU,
        compile_backend: str = "",
        patience: float = PATIENCE,
    ) -> None:
        """`compile_backend`: "inductor" has the network compiled by torch.compile; empty leaves it as it is."""
        self.encoder, self.size, self.patience = encoder, size, patience
        self.batches = 0
        self._on_gpu = next(encoder.parameters()).device.type == "cuda"
        self._tokens: Callable[[Tensor], Tensor] = encoder.tokens
        if compile_backend:
            self._tokens = torch.compile(encoder.tokens, dynamic=False, backend=compile_backend)
        self._waiting: queue.Queue[Item | None] = queue.Queue(2 * size)
        self._thread = threading.Thread(target=self._compute, name="network", daemon=True)
        self._thread.start()

    def __enter__(self) -> SharedBatches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, once it has done what waits."""
        self._waiting.put(None)
        self._thread.join()

    def encode_all(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Tokens of clips, each uint8 [T, H, W, 3], in their order: float16 [clips, dimension].

        Called by many threads, which decode meanwhile: `clips` is drawn from here. Raises what the network raised.
        """
        tokens = _Tokens()
        count = 0
        for clip in clips:
            if tokens.error is not None:
                break
            self._waiting.put((clip, count, tokens))
            count += 1
        return tokens.wait(count, self.encoder.dimension)

    def _next_batch(self) -> list[Item]:
        """Up to `size` items; empty at the end."""
        first = self._waiting.get()
        if first is None:
            return []
        items, deadline = [first], time.monotonic() + self.patience
        while len(items) < self.size:
            try:
                item = self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                self._waiting.put(None)  # for the next call
                break
            items.append(item)
        return items

    @torch.inference_mode()
    def _compute(self) -> None:
        """Send a batch to the device, and only then fetch the one before: copies and kernels overlap."""
        sent: tuple[list[Item], Tensor] | None = None
        while True:
            if sent is not None and self._waiting.empty():
                self._give_back(*sent)
                sent = None
            items = self._next_batch()
            if not items:
                break
            try:
                result = self._tokens(self.encoder.prepare(self._stacked([item[0] for item in items])))
            except Exception as error:  # it is the callers' to raise
                for _, _, tokens in items:
                    tokens.fail(error)
                continue
            self.batches += 1
            if sent is not None:
                self._give_back(*sent)
            sent = items, result
        if sent is not None:
            self._give_back(*sent)

    def _stacked(self, clips: list[np.ndarray]) -> Tensor:
        """uint8 [size, T, H, W, 3], in pinned memory where there is a GPU."""
        batch = torch.zeros((self.size, *clips[0].shape), dtype=torch.uint8, pin_memory=self._on_gpu)
        np.stack(clips, out=batch.numpy()[: len(clips)])
        return batch

    def _give_back(self, items: list[Item], result: Tensor) -> None:
        try:
            rows = result.float().cpu().numpy().astype(np.float16)
        except Exception as error:  # what a GPU did wrong shows here
            for _, _, tokens in items:
                tokens.fail(error)
            return
        for row, (_, number, tokens) in zip(rows, items):
            tokens.put(number, row)
