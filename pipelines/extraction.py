"""A run of `extract` as the driver sees it: rows go out to a pool, parts are closed as their rows come in.

Tokens never pass through the driver. They stay where they were made, in Ray's object store, until all rows of their
part are settled; then one of the actors fetches them and writes the part, and the driver names it in the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import ObjectLostError
from tqdm import tqdm

from pipelines.caption_source import CaptionSource
from pipelines.extraction_plan import part_name
from pipelines.extraction_pool import DEATHS, Answer, Pool
from pipelines.extraction_worker import ENCODE, WRITE, Outcome, PartRow, Work, describe, describe_crash
from videoclip.data.shards import Manifest, Part
from videoclip.data.stored_list import VideoList
from videoclip.encoders.stretches import Stretch, fit_together

SECONDS_A_JOB = 2.0  # rows that take less go out several together: the driver answers some hundred jobs a second
ROWS_A_JOB = 64
SPARE_PARTS = 8  # beyond those that are being encoded: how many parts may wait for a video that takes long
LOSSES = 3  # times that the tokens of a part may be lost with their machines

Piece = tuple[Any, int]  # the reference to an answer's tokens, and the place in it


@dataclass(eq=False)
class EncodeJob:
    """Rows of one part, to be encoded; `tokens` is the reference to what came out."""

    part: int
    rows: list[int]
    work: list[Work]
    deaths: int = 0
    beside: bool = False
    tokens: Any = None
    started: float = 0.0

    def start(self, actor: Any) -> Any:
        """Call the actor; the answer says what became of each row."""
        self.started = time.monotonic()
        encode = actor.encode.options(num_returns=2, concurrency_group=ENCODE)
        answer, self.tokens = encode.remote(self.work)
        return answer


@dataclass(eq=False)
class WriteJob:
    """A part whose rows are settled, to be written."""

    part: int
    folder: Path
    dimension: int
    rows: list[PartRow]
    tokens: list[Any]
    deaths: int = 0
    beside: bool = True

    def start(self, actor: Any) -> Any:
        """Call the actor; the answer is the `Part`."""
        write = actor.write_part.options(concurrency_group=WRITE)
        return write.remote(self.folder, part_name(self.part), self.dimension, self.rows, *self.tokens)


@dataclass
class Cutting:
    """A long video whose stretches come back one by one."""

    stretches: tuple[Stretch, ...]
    duration: float
    found: dict[int, tuple[Outcome, Piece]] = field(default_factory=dict)


@dataclass
class OpenPart:
    """A part of which rows are on their way. What is settled is (seconds, duration, pieces), or None for the
    quarantine."""

    number: int
    rows: list[int]
    settled: dict[int, tuple[int, float, list[Piece]] | None] = field(default_factory=dict)
    cutting: dict[int, Cutting] = field(default_factory=dict)
    losses: int = 0


class Extraction:
    """Encode the rows of `parts` (number, row numbers) and register every part in the manifest of `folder`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        videos: VideoList,
        parts: list[tuple[int, list[int]]],
        captions: CaptionSource,
        bar: tqdm[Any],
    ) -> None:
        self.folder, self.manifest, self.videos, self.captions, self.bar = folder, manifest, videos, captions, bar
        self.left = sum(len(rows) for _, rows in parts)
        self._parts = iter(parts)
        self._open: dict[int, OpenPart] = {}
        self._row_seconds = SECONDS_A_JOB

    def run(self, pool: Pool) -> None:
        """Until every part is registered. Raises what a worker could not answer for, such as a full disk."""
        jobs = self._jobs(pool)
        more = True
        while more or self._open:
            limit = SPARE_PARTS + 2 * (len(pool.devices) * pool.places) // max(1, self._rows_a_part())
            while more and pool.has_room() and len(self._open) <= limit:
                job = next(jobs, None)
                more = job is not None
                if job is not None:
                    pool.add(job)
            for answer in pool.next():
                self._take(answer, pool)

    def waits_for(self) -> int:
        """How many workers could have something to do: one for each row or stretch."""
        stretches = sum(len(c.stretches) - len(c.found) for part in self._open.values() for c in part.cutting.values())
        return self.left + stretches

    def _rows_a_part(self) -> int:
        return max((len(part.rows) for part in self._open.values()), default=1)

    def _jobs(self, pool: Pool) -> Iterator[EncodeJob]:
        """New rows in their order, several short ones together."""
        for number, rows in self._parts:
            self._open[number] = OpenPart(number, rows)
            first = 0
            while first < len(rows):
                share = self.left // (2 * max(1, len(pool.devices)) * pool.places)
                count = max(1, min(int(SECONDS_A_JOB / self._row_seconds), ROWS_A_JOB, share))
                yield self._encode_job(number, rows[first : first + count])
                first += count

    def _encode_job(self, part: int, rows: list[int]) -> EncodeJob:
        return EncodeJob(part, rows, [Work(video) for video in self.videos.rows(rows)])

    def _take(self, answer: Answer, pool: Pool) -> None:
        job = answer.job
        if isinstance(job, WriteJob):
            self._written(job, answer, pool)
        elif isinstance(job, EncodeJob):
            self._encoded(job, answer, pool)

    def _encoded(self, job: EncodeJob, answer: Answer, pool: Pool) -> None:
        part = self._open[job.part]
        if answer.error is not None:
            if len(job.rows) > 1:  # one of them is to blame: each for itself
                for row in job.rows:
                    pool.add(self._encode_job(job.part, [row]), first=True)
                return
            what = f"took its worker down {DEATHS} times" if answer.gave_up else describe_crash(answer.error)
            outcomes = [Outcome(reason=f"{describe(job.work[0])}: {what}", kind="crashed")]
        else:
            outcomes = answer.value
            spent = (time.monotonic() - job.started) / len(job.rows)
            self._row_seconds += 0.1 * (max(spent, SECONDS_A_JOB / ROWS_A_JOB) - self._row_seconds)
        for place, (row, work, outcome) in enumerate(zip(job.rows, job.work, outcomes)):
            if row in part.settled:
                continue  # another stretch of it could not be encoded
            if outcome.stretches:
                self._cut(part, row, work, outcome, pool)
            elif work.stretch is not None:
                self._join(part, row, work, outcome, (job.tokens, place), pool)
            else:
                self._settle(part, row, outcome, [(job.tokens, place)], pool)

    def _cut(self, part: OpenPart, row: int, work: Work, outcome: Outcome, pool: Pool) -> None:
        """Send out the stretches of a long video, before anything new."""
        part.cutting[row] = Cutting(outcome.stretches, outcome.duration)
        for stretch in reversed(outcome.stretches):
            pool.add(EncodeJob(part.number, [row], [Work(work.video, stretch)]), first=True)

    def _join(self, part: OpenPart, row: int, work: Work, outcome: Outcome, piece: Piece, pool: Pool) -> None:
        """Take one stretch; the last of them settles the video, or has it encoded in one piece."""
        cutting = part.cutting.get(row)
        if cutting is None:
            return  # it is being encoded in one piece
        assert work.stretch is not None
        if outcome.kind == "crashed" and outcome.reason:
            del part.cutting[row]
            self._settle(part, row, outcome, [], pool)
            return
        cutting.found[cutting.stretches.index(work.stretch)] = outcome, piece
        if len(cutting.found) < len(cutting.stretches):
            return
        del part.cutting[row]
        outcomes = [cutting.found[number][0] for number in range(len(cutting.stretches))]
        seams = [one.seam for one in outcomes if one.seam is not None]
        lengths = [one.seconds for one in outcomes]
        if len(seams) == len(outcomes) and fit_together(cutting.stretches, lengths, seams):
            whole = Outcome(sum(lengths), cutting.duration)
            self._settle(part, row, whole, [cutting.found[n][1] for n in range(len(outcomes))], pool)
        else:
            pool.add(EncodeJob(part.number, [row], [Work(work.video, cut=False)]), first=True)

    def _settle(self, part: OpenPart, row: int, outcome: Outcome, pieces: list[Piece], pool: Pool) -> None:
        """Note what became of a row; the last one of a part has it written."""
        if outcome.reason:
            self.captions.quarantine.add(self.videos.row(row).video_id, outcome.reason, kind=outcome.kind)
            self.captions.quarantine.save()
        part.settled[row] = None if outcome.reason else (outcome.seconds, outcome.duration, pieces)
        self.left -= 1
        self.bar.update()
        if len(part.settled) == len(part.rows):
            self._write(part, pool)

    def _write(self, part: OpenPart, pool: Pool) -> None:
        rows: list[PartRow] = []
        tokens: dict[Any, int] = {}  # every answer is fetched once, however many rows it holds
        for row in part.rows:
            if (settled := part.settled[row]) is None:
                continue
            seconds, duration, pieces = settled
            video_id = self.videos.row(row).video_id
            places = tuple((tokens.setdefault(reference, len(tokens)), place) for reference, place in pieces)
            rows.append(PartRow(video_id, duration, self.captions.of_video(video_id, seconds), places))
        self.captions.quarantine.save()
        if rows:
            pool.add(WriteJob(part.number, self.folder, self.manifest.dimension, rows, list(tokens)), first=True)
        else:
            del self._open[part.number]

    def _written(self, job: WriteJob, answer: Answer, pool: Pool) -> None:
        part = self._open[job.part]
        if answer.error is None:
            del self._open[job.part]
            register(self.folder, self.manifest, answer.value)
            return
        if not isinstance(answer.error, ObjectLostError) or part.losses == LOSSES:
            raise answer.error
        part.losses += 1  # a machine is gone, and the tokens with it
        again = [row for row in part.rows if part.settled[row] is not None]
        for row in again:
            del part.settled[row]
            pool.add(self._encode_job(part.number, [row]), first=True)
        self.left += len(again)
        self.bar.update(-len(again))


def register(folder: Path, manifest: Manifest, part: Part) -> None:
    """Name a part in the manifest. Parts stand there by their numbers, in whatever order they were finished."""
    manifest.parts = sorted([*manifest.parts, part], key=lambda one: (len(one.name), one.name))
    manifest.complete = False
    manifest.write(folder)
