"""What batches of similar videos are worth on a world of tokens: the table of docs/batches.md.

Every run trains the same small model for as many steps on one world; only its batches differ. Seeds are worlds, too.
R@1 is over all test steps: each is looked for among those of its own domain, and among as many of all domains.
`--rows decisive` (random, one cluster, default; three seeds) takes some 25 minutes on one idle core, `--rows full` an
hour on two with `--part 1/2` and `--part 2/2` beside each other. Finished runs are kept in --output and not repeated.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pipelines.pretrain_batches import BatchPlan, Clusterings
from videoclip.checkpoints import TrainingState
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import TOKENIZER_FILE, WordTokenizer, train_wordpiece
from videoclip.data.youcook2 import read_youcook2
from videoclip.embedding import embed_clips, embed_texts
from videoclip.evaluation.retrieval import gather_clips, windows_of_lengths
from videoclip.files import read_json, write_json
from videoclip.recipes import videoclip as videoclip_recipe
from videoclip.recipes.videoclip import Recipe
from videoclip.retrieval.clustering import NOTHING, Skip
from videoclip.retrieval.epochs import BatchOptions
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.synthetic.world import World, WorldConfig, write_world
from videoclip.training import EpochBatches, OptimizerConfig, make_optimizer, spread_batches, train_epoch

CLIPS = ClipConfig(clips_per_video=8, min_words=4, max_words=16, min_seconds=3, max_seconds=8)
MODEL = videoclip_recipe.Options(width=64, layers=1, heads=4, max_seconds=8, max_words=16)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=100)
NEGATIVES = FalseNegativeConfig()
TEACHER = "teacher"  # stands for the model that random batches made of the same world


@dataclass(frozen=True)
class Variant:
    """What a row of the table does."""

    batches: BatchOptions = field(default_factory=BatchOptions)
    similarity: str = "model"
    negatives: FalseNegativeConfig = NEGATIVES
    workers: int = 1  # so many batches meet in one loss, as those of so many workers do
    duplicates: np.ndarray | None = None  # labels of the videos, in place of those that clustering finds


def clusters(count: int, skip: Skip = NOTHING) -> BatchOptions:
    """Batches of 32 of so many clusters."""
    return BatchOptions(clusters_per_batch=count, skip=skip)


DECISIVE = {
    "random": Variant(BatchOptions(mode="random")),
    "1 cluster of 32": Variant(clusters(1)),
    "8 clusters of 4 (default)": Variant(),
}
VARIANTS = {
    **DECISIVE,
    "2 clusters of 16": Variant(clusters(2)),
    "4 clusters of 8": Variant(clusters(4)),
    "16 clusters of 2": Variant(clusters(16)),
    "8 of 4, by frozen tokens": Variant(similarity="tokens"),
    "8 of 4, by a teacher": Variant(similarity=TEACHER),
    "8 of 4, nearest skipped": Variant(clusters(8, Skip(nearest=1))),
    "8 of 4, skipped from 0.95 on": Variant(clusters(8, Skip(similarity=0.95))),
    "8 of 4, no negative left out": Variant(negatives=FalseNegativeConfig(False, None)),
    "random, 4 workers": Variant(BatchOptions(mode="random"), workers=4),
    "1 cluster of 32, 4 workers": Variant(clusters(1), workers=4),
    "8 of 4, 4 workers": Variant(workers=4),
}
FIRST = [*DECISIVE, "4 clusters of 8", "16 clusters of 2", "8 of 4, by frozen tokens", "8 of 4, nearest skipped"]


def prepare(folder: Path, config: WorldConfig) -> tuple[Shards, WordTokenizer]:
    """The world's training shards and a tokenizer fitted to them; made unless they are there."""
    if not (folder / "topics.json").exists():
        write_world(World(config), folder)
    shards = Shards(folder / "train")
    if not (folder / TOKENIZER_FILE).exists():
        train_wordpiece([text for part in shards.parts for text in part.caption_text.to_pylist()], 4000).save(folder)
    return shards, WordTokenizer.load(folder)


def train(folder: Path, config: WorldConfig, variant: Variant, output: Path, epochs: int) -> dict[str, float]:
    """One run: R@1 in both kinds of galleries, and the share of its time that finding batches took, in percent."""
    shards, tokenizer = prepare(folder, config)
    sampler = ClipSampler(shards, tokenizer, CLIPS, folder)
    torch.manual_seed(config.seed)
    model = videoclip_recipe.build(MODEL, shards.manifest, tokenizer)
    optimizer, state = make_optimizer(model, OPTIMIZER), TrainingState()
    options = replace(variant.batches, duplicate_similarity=variant.negatives.duplicate_similarity)
    plan = BatchPlan(options, variant.similarity, 2, True, folder / "topics.json", config.seed)
    clusterings = Clusterings(plan, output, sampler, 0, 1)
    total = epochs * -(-len(clusterings.rows) // (options.videos_per_batch * variant.workers))
    finding, start, purity = 0.0, time.perf_counter(), 0.0
    for epoch in range(epochs):
        began = time.perf_counter()
        clustering = clusterings.start_epoch(epoch, model)
        finding += time.perf_counter() - began
        purity = clustering.figures["cluster_purity"]
        steps = spread_batches(clustering.batches, variant.workers)
        duplicates = clustering.duplicates if variant.duplicates is None else variant.duplicates
        batches = EpochBatches(sampler, steps, config.seed, epoch, 0, variant.negatives, duplicates)
        torch.manual_seed(config.seed * 1000 + epoch)  # dropout
        for _ in train_epoch(model, optimizer, batches, state, total, OPTIMIZER):
            pass
    seconds = time.perf_counter() - start
    model.train(False)
    model.save_pretrained(output / "model")
    found = {"finding batches": 100 * finding / (seconds - finding), "seconds": seconds, "cluster purity": purity}
    return {**recall_in_galleries(model, folder, config.domains), **found}


def recall_in_galleries(model: Recipe, folder: Path, domains: int) -> dict[str, float]:
    """R@1 in percent of every test step among those of its domain, and among equally many of all domains.

    A clip with the same description, word by word, is as right as the described one.
    """
    test = Shards(folder / "test")
    annotated = [read_youcook2(folder / f"youcookii_domain-{domain:02d}.json") for domain in range(domains)]
    domain = np.repeat(np.arange(domains), [len(clips) for clips in annotated])
    gathered = gather_clips(test, [clip for clips in annotated for clip in clips], MODEL.max_seconds)
    videos = embed_clips(model, gathered.tokens, windows_of_lengths(gathered.lengths))
    sentences = np.array([clip.sentences[0] for clip in gathered.clips])
    texts = embed_texts(model, sentences.tolist())
    ids = sorted({clip.video_id for clip in gathered.clips})
    # Whole videos are dealt out, as they are to the galleries of one domain.
    place = dict(zip(ids, np.random.default_rng(0).permutation(len(ids)) % domains))
    mixed = np.array([place[clip.video_id] for clip in gathered.clips])
    return {
        name: _recall(texts, videos, sentences, gallery) for name, gallery in (("one domain", domain), ("all", mixed))
    }


def _recall(texts: np.ndarray, videos: np.ndarray, sentences: np.ndarray, gallery: np.ndarray) -> float:
    right = []
    for number in np.unique(gallery):
        inside = gallery == number
        first = (texts[inside] @ videos[inside].T).argmax(1)
        right.append(sentences[inside][first] == sentences[inside])
    return 100 * float(np.concatenate(right).mean())


def run(name: str, variant: Variant, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """A finished run's figures, or those of a new one."""
    config = replace(WorldConfig(), seed=seed, videos=options.videos)
    world = options.output / f"world-{config.videos}-{seed}"
    output = options.output / f"{name.replace(' ', '-').replace(',', '')}-{config.videos}-{options.epochs}-{seed}"
    if (output / "figures.json").exists():
        return read_json(output / "figures.json")
    if variant.similarity == TEACHER:
        run("random", VARIANTS["random"], seed, options)
        variant = replace(
            variant, similarity=str(options.output / f"random-{config.videos}-{options.epochs}-{seed}/model")
        )
    figures = train(world, config, variant, output, options.epochs)
    write_json(output / "figures.json", figures)
    return figures


def main() -> None:
    """Train what is missing, and print mean and standard deviation over the seeds, one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/batches"))
    parser.add_argument("--rows", choices=["decisive", "reduced", "full"], default="decisive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--part", default="1/1", help="2/3: only every third run from the second on is made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = {"decisive": list(DECISIVE), "reduced": FIRST, "full": list(VARIANTS)}[options.rows]
    part, parts = map(int, options.part.split("/"))
    runs = [(name, seed) for seed in range(options.seeds) for name in names]
    for name, seed in runs[part - 1 :: parts]:
        print(f"{name}, seed {seed}: {run(name, VARIANTS[name], seed, options)}", flush=True)
    if parts > 1:
        return
    columns = ("one domain", "all", "cluster purity", "finding batches")
    print("\n| batch of 32 videos | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name in names:
        figures = [run(name, VARIANTS[name], seed, options) for seed in range(options.seeds)]
        cells = []
        for column in columns:
            values = [of_seed[column] for of_seed in figures]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
