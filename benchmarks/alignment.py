"""What alignment puts right, and what training on its output is worth, where the truth is known: docs/alignment.md.

On worlds of tokens, made in seconds, and with `--kitchen DEMO ...` on finished demos (`videoclip demo --seed N`). A
model of the recipe `alignment` learns from the training videos' narration as it is; then the held-out videos' captions
are aligned by it, and by a dual encoder that was trained on clips (a demo has one). A caption is
shifted if it does not touch the step that it is about, and put right if it does afterwards; spoilt the other way round.
Off-topic captions are dropped below the highest limit at which nine of ten dropped are off topic (by the truth), and
below the limit that `videoclip align` finds without it. `recall` is that of `evaluate htm-align`, on the same videos in
its form.

`--worth` trains a dual encoder on the training captions as they are, aligned, and true (every caption at its step,
none off topic), in as many steps each: R@1 of every held-out step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from videoclip.alignment import Aligner, Moves
from videoclip.checkpoints import TrainingState
from videoclip.data.captions import Captions, captions_of_video
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.htm_align import AlignedVideo
from videoclip.data.shards import Shards, ShardWriter
from videoclip.data.words import WordTokenizer, train_wordpiece
from videoclip.data.youcook2 import read_youcook2
from videoclip.embedding import TwoTowers, embed_texts
from videoclip.evaluation.alignment import align_videos, area_under_curve
from videoclip.evaluation.retrieval import retrieve_clips
from videoclip.evaluation.sentences import Reading, ReadsTogether, reads_together
from videoclip.files import read_json, write_json
from videoclip.packed import Packed
from videoclip.recipes import alignment, from_pretrained, videoclip
from videoclip.synthetic.kitchen import KitchenConfig, narrate, plan_kitchen, steps_of_captions
from videoclip.synthetic.world import OFF_TOPIC, World, WorldConfig, videos_of, write_world
from videoclip.training import EpochBatches, OptimizerConfig, make_optimizer, train_epoch

MOVES = Moves()
PRECISION = 0.9


@dataclass(frozen=True)
class Corpus:
    """Training and test shards, captions of both with what is known of them, and how large a model they want.

    `steps`: of every video its steps, float64 [S, 2]; `about`: of every caption the steps that it is about, None for
    what is off topic, nothing where it is not known.
    """

    name: str
    train: Shards
    test: Shards
    captions: dict[str, Captions]
    steps: dict[str, np.ndarray]
    about: dict[str, list[set[int | None]]]
    gallery: Path
    width: int
    layers: int
    clips: ClipConfig
    dropout: float
    dual: Path | None = None
    """A dual encoder that is there already."""


def kitchen(demo: Path) -> Corpus:
    """The cooking channel of a finished demo."""
    config = KitchenConfig(seed=int(read_json(demo / "demo.json")["seed"]))
    captions, steps, about = {}, {}, {}
    for video in plan_kitchen(config):
        said, _ = captions_of_video(narrate(video, config), video.duration, video.video_id, config.seed)
        captions[video.video_id] = said
        steps[video.video_id] = np.array([[step.start, step.end] for step in video.steps])
        about[video.video_id] = steps_of_captions(video, config, said)
    shards = Shards(demo / "tokens" / "train"), Shards(demo / "tokens" / "test")
    clips = ClipConfig(clips_per_video=8, min_words=4, max_words=32, min_seconds=3, max_seconds=20)
    gallery = demo / "corpus" / "youcookii_annotations_trainval.json"
    return Corpus(
        f"kitchen {config.seed}", *shards, captions, steps, about, gallery, 128, 2, clips, 0.3, demo / "model"
    )


def world(folder: Path, config: WorldConfig) -> Corpus:
    """A world of tokens; written unless it is there."""
    made = World(config)
    if not (folder / "topics.json").exists():
        write_world(made, folder)
    captions, steps, about = {}, {}, {}
    for split in ("train", "test"):
        for video in videos_of(made, split):
            name = video.record.video_id
            captions[name], steps[name] = video.record.captions, video.steps
            about[name] = [{line} if line >= 0 else {None} if line == OFF_TOPIC else set() for line in video.line_step]
    clips = ClipConfig(clips_per_video=8, min_words=4, max_words=16, min_seconds=3, max_seconds=8)
    shards = Shards(folder / "train"), Shards(folder / "test")
    gallery = folder / "youcookii_all.json"
    return Corpus(f"world {config.seed}", *shards, captions, steps, about, gallery, 64, 1, clips, 0.1)


# --- Training ---------------------------------------------------------------------------------------------------------


def trained(
    corpus: Corpus, folder: Path, kind: str, steps: int, seed: int, captions: dict[str, Captions] | None = None
) -> Any:
    """A model of the recipe `alignment`, or a dual encoder, after so many steps on random batches; kept in `folder`."""
    if (folder / "config.json").exists():
        return from_pretrained(folder)
    shards = corpus.train if captions is None else with_captions(corpus.train, captions, folder.with_suffix(".shards"))
    tokenizer = tokenizer_of(corpus)
    options: dict[str, Any] = {"width": corpus.width, "layers": corpus.layers, "heads": 4, "dropout": corpus.dropout}
    torch.manual_seed(seed)
    sampler: ClipSampler
    if kind == "alignment":
        config = alignment.Options(**options, max_words=32, joint_layers=corpus.layers + 1, agree_after=steps // 2)
        model: nn.Module = alignment.build(config, shards.manifest, tokenizer)
        sampler = alignment.sampler(config, shards, tokenizer, replace(corpus.clips, max_words=32), folder.parent)
    else:
        limits = {"max_seconds": corpus.clips.max_seconds, "max_words": corpus.clips.max_words}
        model = videoclip.build(videoclip.Options(**options, **limits), shards.manifest, tokenizer)
        sampler = ClipSampler(shards, tokenizer, corpus.clips, folder.parent)
    train(model, sampler, steps, seed)
    model.train(False)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def dual_encoder(corpus: Corpus, folder: Path, steps: int, seed: int) -> TwoTowers:
    """The corpus' own, or a new one."""
    model: TwoTowers = (
        trained(corpus, folder, "dual", steps, seed) if corpus.dual is None else from_pretrained(corpus.dual)
    )
    return model


def tokenizer_of(corpus: Corpus) -> WordTokenizer:
    """Fitted to the training captions as they are."""
    return train_wordpiece([text for part in corpus.train.parts for text in part.caption_text.to_pylist()], 4000)


def train(model: nn.Module, sampler: ClipSampler, steps: int, seed: int, videos: int = 16) -> None:
    """So many steps on random batches."""
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=50)
    optimizer, state = make_optimizer(model, config), TrainingState()
    rows, generator = sampler.usable_rows(), np.random.default_rng([seed, 1])
    batches: list[list[np.ndarray]] = []
    while len(batches) < steps:
        order = generator.permutation(rows)
        batches += [[order[first : first + videos]] for first in range(0, len(order) - videos + 1, videos)]
    for _ in train_epoch(model, optimizer, EpochBatches(sampler, batches[:steps], seed, 0), state, steps, config):
        pass


def with_captions(shards: Shards, captions: dict[str, Captions], folder: Path) -> Shards:
    """The same videos with other captions."""
    writer = ShardWriter(folder, replace(shards.manifest, parts=[], complete=False), 1000)
    for record in shards:
        writer.add(replace(record, captions=captions[record.video_id]))
    writer.close()
    return Shards(folder)


# --- What alignment does ----------------------------------------------------------------------------------------------


def judge(corpus: Corpus, model: TwoTowers, by: Reading) -> dict[str, float]:
    """The figures of the table, in percent, over the held-out videos."""
    aligner = Aligner.fit(model, with_narration(corpus), replace(MOVES, by=by), PRECISION)
    overlaps, standing, off = [], [], []
    for row, record in enumerate(with_narration(corpus)):
        placed = aligner.place(record, row)
        steps = corpus.steps[record.video_id]
        for s, about in enumerate(corpus.about[record.video_id]):
            if about:
                standing.append(placed.standing[s])
                off.append(about == {None})
            if len(about) == 1 and None not in about:
                start, end = steps[about.copy().pop()]
                times = np.array([record.captions.start[s], record.captions.end[s]], np.float64)
                overlaps.append([min(t[1], end) > max(t[0], start) for t in (times, times + placed.shift[s])])
    before, after = np.array(overlaps).T
    as_benchmark, _ = align_videos(model, corpus.test, of_benchmark(corpus), by=by)
    assert aligner.limit is not None
    dropped = np.array(standing) < aligner.limit.standing
    off_topic = np.array(off)
    return {
        "lines": len(before),
        "shifted": 100 * float((~before).mean()),
        "put right": 100 * float(after[~before].mean()),
        "spoilt": 100 * float((~after[before]).mean()),
        "off topic": 100 * float(off_topic.mean()),
        "AUC": 100 * area_under_curve(np.array(standing), ~off_topic),
        "recall": as_benchmark["recall"],
        "chance": as_benchmark["chance_recall"],
        "dropped at 90%": 100 * recall_at_precision(np.array(standing), off_topic, PRECISION),
        "AUC of the head": 100 * auc_of_head(corpus, model) if reads_together(model) else float("nan"),
        "dropped": 100 * float(dropped[off_topic].mean()),
        "precision": 100 * float(off_topic[dropped].mean()) if dropped.any() else float("nan"),
    }


@torch.inference_mode()
def auc_of_head(corpus: Corpus, model: ReadsTogether) -> float:
    """How well the recipe's own head tells captions that are shown from others, in a video's first stretch."""
    alignable, shown = [], []
    for record in corpus.test:
        said, about = corpus.captions[record.video_id], corpus.about[record.video_id]
        first = record.tokens[: model.config.max_seconds]
        known = [i for i, end in enumerate(said.end) if end <= len(first) and about[i]]
        if known:
            texts = torch.from_numpy(embed_texts(model, [said.text[i] for i in known]))
            video = Packed.of([torch.from_numpy(first.copy())])
            alignable.append(model.read_together(video, texts, torch.tensor([len(known)]))[1].numpy())
            shown += [about[i] != {None} for i in known]
    return area_under_curve(np.concatenate(alignable), np.array(shown))


def of_benchmark(corpus: Corpus) -> list[AlignedVideo]:
    """The held-out videos in HTM-Align's form: times of the step, or of speech where nothing of it is shown."""
    videos = []
    for record in corpus.test:
        said, steps = corpus.captions[record.video_id], corpus.steps[record.video_id]
        rows = []
        for start, end, text, about in zip(said.start, said.end, said.text, corpus.about[record.video_id]):
            if about and len(about - {None}) <= 1:
                (step,) = (about - {None}) or {None}
                times = (float(start), float(end)) if step is None else tuple(steps[step].tolist())
                rows.append((step is not None, *times, text))
        if rows:
            alignable, starts, ends, texts = zip(*rows)
            times = np.array(starts), np.array(ends)
            videos.append(AlignedVideo(record.video_id, np.array(alignable), *times, list(texts)))
    return videos


def with_narration(corpus: Corpus) -> Shards:
    """The test shards with their narration; written beside them, where they hold none."""
    if any(len(part.caption_text) for part in corpus.test.parts):
        return corpus.test
    folder = OUTPUT / f"{corpus.name.replace(' ', '-')}-narrated"
    return (
        Shards(folder) if (folder / "manifest.json").exists() else with_captions(corpus.test, corpus.captions, folder)
    )


def recall_at_precision(score: np.ndarray, positive: np.ndarray, precision: float) -> float:
    """Share of the positives [N] among the lowest scores, as many as there are with at least that precision."""
    found = np.cumsum(positive[np.argsort(score, kind="stable")])
    fits = np.flatnonzero(found >= precision * np.arange(1, len(found) + 1))
    return float(found[fits[-1]] / positive.sum()) if len(fits) else 0.0


# --- What it is worth -------------------------------------------------------------------------------------------------


def true_captions(captions: Captions, steps: np.ndarray, about: Sequence[set[int | None]]) -> Captions:
    """Every caption at the step that it is about, as near as can be to where it was, and none off topic."""
    rows = []
    for start, end, text, of in zip(captions.start, captions.end, captions.text, about):
        known = [step for step in of if step is not None]
        if known:
            first, last = steps[known].min(), steps[known].max()
            moved = np.clip(start, first, max(first, last - (end - start)))
            rows.append((moved, moved + end - start, text))
    rows.sort(key=lambda row: row[:2])
    start, end = (np.array([row[i] for row in rows], np.float32) for i in (0, 1))
    return Captions(start, end, [row[2] for row in rows])


def worth(corpus: Corpus, aligning: TwoTowers, folder: Path, steps: int, seed: int) -> dict[str, float]:
    """R@1 in percent of a dual encoder trained on captions as they are, aligned, and true."""
    aligner = Aligner.fit(aligning, corpus.train, MOVES, PRECISION)
    aligned = {record.video_id: aligner.align(record, row) for row, record in enumerate(corpus.train)}
    ids = [record.video_id for record in corpus.train]
    true = {i: true_captions(corpus.captions[i], corpus.steps[i], corpus.about[i]) for i in ids}
    said = {i: corpus.captions[i] for i in ids}
    clips, results = read_youcook2(corpus.gallery), {}
    for name, captions in {"as they are": said, "aligned": aligned, "true": true}.items():
        model = trained(corpus, folder / name.replace(" ", "-"), "dual", steps, seed, captions)
        results[name] = float(retrieve_clips(model, corpus.test, clips)[0]["R@1"])
    return results


OUTPUT = Path("runs/alignment")


def main() -> None:
    """Print the tables."""
    global OUTPUT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--kitchen", type=Path, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3, help="worlds; 0: none")
    parser.add_argument("--videos", type=int, default=2000, help="training videos of a world")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--worth", action="store_true")
    options = parser.parse_args()
    OUTPUT = options.output
    torch.set_num_threads(1)
    sizes = {"videos": options.videos, "test_videos": 200, "domains": 4, "topics": 40}
    corpora = [kitchen(demo) for demo in options.kitchen]
    corpora += [world(OUTPUT / f"world-{seed}", WorldConfig(seed=seed, **sizes)) for seed in range(options.seeds)]
    first = True
    for number, corpus in enumerate(corpora):
        folder = OUTPUT / f"{corpus.name.replace(' ', '-')}-{options.steps}"
        models = {
            "dual": dual_encoder(corpus, folder / "dual", options.steps, number),
            "alignment": trained(corpus, folder / "alignment", "alignment", options.steps, number),
        }
        ways: list[tuple[str, Reading]] = [("dual", "towers"), ("alignment", "towers"), ("alignment", "both")]
        for kind, by in ways:
            figures = judge(corpus, models[kind], by)
            if first:
                print("| corpus | model | " + " | ".join(figures) + " |\n|---|---|" + "---|" * len(figures))
                first = False
            cells = [f"{value:.0f}" if name == "lines" else f"{value:.1f}" for name, value in figures.items()]
            print(f"| {corpus.name} | {kind}, {by} | {' | '.join(cells)} |", flush=True)
            known = {name: round(value, 2) for name, value in figures.items() if not np.isnan(value)}
            write_json(folder / f"{kind}-{by}.json", known)
        if options.worth:
            print(
                f"{corpus.name}, R@1 by captions: {worth(corpus, models['alignment'], folder, options.steps, number)}"
            )


if __name__ == "__main__":
    main()
