"""TeachText on the embedded corpus: do several texts teach a student more than one, and find captions that are noise?

Each seed is a corpus of its own (`kitchen_experts.py`, `kitchen_texts.py`). A student that reads count vectors is
trained alone; taught by one teacher that reads the same (self-distillation); by three that read counts, MiniLM's input
embeddings and MiniLM's hidden states; by each of these alone; and by one that was trained on shuffled pairs. All have
the same first weights, draws and steps. Then captions are masked by their rank under the mean teacher.

Nothing was tuned on another seed than 0; the table is of seeds 1 to 5. A seed takes about a minute of one core for its
corpus and four for its runs; finished features and rows are kept in --output and used again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from kitchen_experts import Split, kitchen_clips
from kitchen_texts import CountVectors, Encoder, Said, minilm_encoders, phrases_of_clips, written_captions

from videoclip.data.described_clips import DescribedClips, draw_epoch
from videoclip.evaluation.similarities import figures, text_ranks
from videoclip.files import write_json
from videoclip.recipes.experts import Experts, ExpertsConfig
from videoclip.recipes.teachtext import (
    ExpertsSide,
    Options,
    StoredSide,
    TeachText,
    caption_mask,
    caption_ranks,
    learning_rate_at,
    make_optimizer,
    train_on_clips,
)

TEXTS = ("counts", "static", "contextual")  # the student reads the first
COLUMNS = ("R@1", "R@5", "R@10", "geometric_mean")


@dataclass(frozen=True)
class Setting:
    """Of all runs of the experiment."""

    steps: int = 700
    batch: int = 64
    width: int = 64
    clusters: int = 4
    learning_rate: float = 1e-3
    decay: float = 0.97
    margin: float = 0.2
    distillation: float = 30.0


LIMITS = (1, 2, 3, 5, 10, 20, 50, 100)  # that --limits looks at
LIMIT = 100  # the release's, of 6,513 clips; here there are some 740


@dataclass(frozen=True)
class Corpus:
    """Clips to train with, what is true of their texts, and clips to be found, one caption each."""

    train: DescribedClips
    said: list[Said]
    test: DescribedClips


def make_corpus(seed: int, folder: Path, minilm: dict[str, Encoder]) -> Corpus:
    """The corpus of one seed; experts are standardised by the training clips."""
    splits = kitchen_clips(seed, folder)
    heard = phrases_of_clips(splits["train"], seed)
    texts = [[phrase.text for phrase in phrases] for phrases in heard]
    encoders = {"counts": CountVectors([text for own in texts for text in own]), **minilm}
    scales = {name: (x.mean(0), x.std(0) + 1e-6) for name, x in splits["train"].experts.items()}

    def described(split: Split, texts: list[list[str]]) -> DescribedClips:
        flat = [text for own in texts for text in own]
        return DescribedClips(
            tuple(f"{split.videos[video].video_id}-{step}" for video, step in split.steps),
            {name: torch.from_numpy((x - scales[name][0]) / scales[name][1]) for name, x in split.experts.items()},
            {},
            {name: encoder(flat) for name, encoder in encoders.items()},
            torch.tensor([len(own) for own in texts]),
        )

    test = described(splits["test"], [[text] for text in written_captions(splits["test"])])
    return Corpus(described(splits["train"], texts), [said for phrases in heard for said in phrases], test)


def trained(
    clips: DescribedClips,
    text: str,
    setting: Setting,
    seed: int,
    teachers: Sequence[StoredSide] = (),
    mask: np.ndarray | None = None,
    distillation: float | None = None,
) -> ExpertsSide:
    """A CE network from the first weights and draws that belong to `seed`, so that runs of one seed are pairs."""
    torch.manual_seed(seed)
    clips = replace(clips, texts={text: clips.texts[text]})  # a batch need not take what nobody reads
    widths = {name: x.shape[1] for name, x in clips.experts.items() if isinstance(x, torch.Tensor)}
    dimension = clips.texts[text].rows.shape[1]
    config = ExpertsConfig.of(widths, dimension, width=setting.width, text_clusters=setting.clusters, text_ghosts=1)
    side = ExpertsSide(Experts(config), text)
    weight = setting.distillation if distillation is None else distillation
    recipe = TeachText(side, teachers, Options(setting.margin, weight))
    optimizer = make_optimizer(side)
    epochs = (
        draw_epoch(clips.counts.numpy(), setting.batch, np.random.default_rng([seed, epoch]), mask) for epoch in count()
    )
    steps = train_on_clips(
        recipe, optimizer, clips, epochs, lambda epoch, _: learning_rate_at(epoch, setting.learning_rate, setting.decay)
    )
    for _ in zip(range(setting.steps), steps):
        pass
    side.eval()
    return side


def shuffled(clips: DescribedClips, seed: int) -> DescribedClips:
    """The same texts at other clips."""
    order = torch.from_numpy(np.random.default_rng([seed, 9]).permutation(len(clips)))
    experts = {name: x[order] for name, x in clips.experts.items() if isinstance(x, torch.Tensor)}
    return replace(clips, experts=experts)


def scores(similarities: torch.Tensor) -> dict[str, float]:
    """Text to video, every caption's own clip being the one of its number."""
    found = figures(text_ranks(similarities.numpy(), np.arange(len(similarities))))
    return {name: found[name] for name in COLUMNS}


def tested(sides: Sequence[ExpertsSide], clips: DescribedClips) -> dict[str, float]:
    """Of one model, or of the mean of several models' similarities."""
    everything = torch.arange(len(clips))
    return scores(
        torch.stack([StoredSide.of(side, clips).similarities(everything, everything) for side in sides]).mean(0)
    )


def masked(ranks: np.ndarray, corpus: Corpus, limit: int, seed: int) -> tuple[np.ndarray, dict[str, float]]:
    """The mask, and how well it finds what is not about its clip, beside a random mask of the same size."""
    mask = caption_mask(ranks, limit)
    noise = np.array([not said.right for said in corpus.said])
    unrelated = np.array([not said.of_a_step for said in corpus.said])
    random = np.random.default_rng([seed, 8]).permutation(mask)
    found = {"noise": float(noise.mean()), "dropped": float((~mask).mean())}
    for name, kept in (("mask", mask), ("random", random)):
        found[f"{name} precision"] = float(noise[~kept].mean())
        found[f"{name} recall"] = float((~kept)[noise].mean())
        found[f"{name} recall of unrelated"] = float((~kept)[unrelated].mean())
        found[f"{name} recall of other steps"] = float((~kept)[noise & ~unrelated].mean())
    return mask, {name: 100 * value for name, value in found.items()}


Results = dict[str, dict[str, float]]


class Runs:
    """All that is trained on one seed's corpus."""

    def __init__(self, seed: int, corpus: Corpus, setting: Setting) -> None:
        self.seed, self.corpus, self.setting = seed, corpus, setting
        numbers = (1000 * seed + 1 + i for i in count())
        self.sides = {text: trained(corpus.train, text, setting, next(numbers)) for text in TEXTS}
        self.teachers = {text: StoredSide.of(side, corpus.train) for text, side in self.sides.items()}
        self.next_number = next(numbers)

    def student(self, name: str, teachers: Sequence[str], mask: np.ndarray | None = None, weight: float = 0) -> Results:
        """One row: a student taught by these."""
        chosen = [self.teachers[text] for text in teachers]
        return self._row(name, chosen, mask, weight)

    def _row(
        self, name: str, teachers: Sequence[StoredSide], mask: np.ndarray | None = None, weight: float = 0
    ) -> Results:
        side = trained(self.corpus.train, TEXTS[0], self.setting, 1000 * self.seed, teachers, mask, weight or None)
        found = tested([side], self.corpus.test)
        print(self.seed, name, {key: round(value, 1) for key, value in found.items()}, flush=True)
        return {name: found}

    def plain(self) -> Results:
        """Teachers and students of all captions: name -> scores."""
        results = {f"teacher {text}": tested([side], self.corpus.test) for text, side in self.sides.items()}
        results["teachers' mean"] = tested(list(self.sides.values()), self.corpus.test)
        results |= self.student("alone", ())
        results |= self.student("taught by all", TEXTS) | self.student("taught by all, weight 1", TEXTS, weight=1.0)
        for text in TEXTS:
            results |= self.student(f"taught by {text}", (text,))
        clips = self.corpus.train
        wrong = trained(shuffled(clips, self.seed), TEXTS[0], self.setting, self.next_number)
        return results | self._row("taught by shuffled", [StoredSide.of(wrong, clips)])

    def denoised(self, limit: int) -> Results:
        """Students of what the mean teacher does not rank too far; "denoising": the mask's precision and recall."""
        ranks = caption_ranks(list(self.teachers.values()), self.corpus.train)
        mask, found = masked(ranks, self.corpus, limit, self.seed)
        results = self.student("alone, denoised", (), mask) | self.student("taught by all, denoised", TEXTS, mask)
        return results | {"denoising": found}


# --- The table ----------------------------------------------------------------------------------------------------

ROWS = (
    "teacher counts",
    "teacher static",
    "teacher contextual",
    "teachers' mean",
    "alone",
    "taught by counts",
    "taught by static",
    "taught by contextual",
    "taught by all",
    "taught by all, weight 1",
    "taught by shuffled",
    "alone, denoised",
    "taught by all, denoised",
)
PAIRS = (
    ("taught by all", "alone"),
    ("taught by counts", "alone"),
    ("taught by all", "taught by counts"),
    ("taught by all", "taught by contextual"),
    ("taught by all, weight 1", "alone"),
    ("taught by shuffled", "alone"),
    ("alone, denoised", "alone"),
    ("taught by all, denoised", "taught by all"),
)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def print_tables(results: list[Results]) -> None:
    """Scores, paired differences, and the mask, as they stand in docs/systems.md."""
    print(f"\n| {len(results)} seeds | R@1 | R@5 | R@10 | geometric mean |\n|---|---|---|---|---|")
    for row in ROWS:
        columns = (spread([result[row][column] for result in results]) for column in COLUMNS)
        print(f"| {row} | " + " | ".join(f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in columns) + " |")
    print("\n| paired difference | R@1 | geometric mean | two standard errors | clear |\n|---|---|---|---|---|")
    for one, other in PAIRS:
        first, (mean, deviation) = (
            spread([result[one][column] - result[other][column] for result in results])
            for column in ("R@1", "geometric_mean")
        )
        errors = 2 * deviation / math.sqrt(len(results))
        clear = "yes" if abs(mean) > errors else "no"
        print(f"| {one} - {other} | {first[0]:+.1f} | {mean:+.1f} | {errors:.1f} | {clear} |")
    print("\n| captions dropped | precision | recall | of unrelated | of other steps |\n|---|---|---|---|---|")
    masks = [result["denoising"] for result in results]
    for name in ("mask", "random"):
        columns = (
            spread([mask[f"{name} {what}"] for mask in masks])
            for what in ("precision", "recall", "recall of unrelated", "recall of other steps")
        )
        print(f"| {name} | " + " | ".join(f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in columns) + " |")
    shares = [spread([mask[name] for mask in masks])[0] for name in ("dropped", "noise")]
    print(f"\n{shares[0]:.1f}% of the captions are dropped, {shares[1]:.1f}% are not about their clip")


def run_or_read(seed: int, limit: int, setting: Setting, folder: Path, minilm: dict[str, Encoder]) -> Results:
    """Rows of one seed; those that are in `folder` already are used again."""
    path = folder / f"seed-{seed}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("setting") != asdict(setting):
        stored = {"setting": asdict(setting)}
    runs: Runs | None = None
    for part, what in (("plain", 0), ("denoised", limit)):
        if stored.get(part, {}).get("limit") != what:
            runs = runs or Runs(seed, make_corpus(seed, folder, minilm), setting)
            rows = runs.denoised(limit) if part == "denoised" else runs.plain()
            stored[part] = {"limit": what, "rows": rows}
            write_json(path, stored)
    return {**stored["plain"]["rows"], **stored["denoised"]["rows"]}


def print_limits(seed: int, setting: Setting, folder: Path, minilm: dict[str, Encoder]) -> None:
    """Precision and recall of masks of several limits on a seed that no table counts."""
    runs = Runs(seed, make_corpus(seed, folder, minilm), setting)
    ranks = caption_ranks(list(runs.teachers.values()), runs.corpus.train)
    for limit in LIMITS:
        found = masked(ranks, runs.corpus, limit, seed)[1]
        print(limit, {name: round(value, 1) for name, value in found.items()}, flush=True)


def main() -> None:
    """Run every seed that is not finished, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/teachtext"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--limit", type=int, default=LIMIT, help="captions are kept whose clip is among so many first")
    parser.add_argument("--limits", action="store_true", help="only what limits would drop, on seed 0")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small; a second core runs other seeds
    setting, minilm = Setting(), minilm_encoders()
    if options.limits:
        print_limits(0, setting, options.output, minilm)
        return
    print_tables([run_or_read(seed, options.limit, setting, options.output, minilm) for seed in options.seeds])


if __name__ == "__main__":
    main()
