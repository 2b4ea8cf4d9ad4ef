"""What the words are worth beside the picture: moments of narrated videos, found by descriptions nobody ever said.

For each of three seeds the demo's corpus and model. The test videos, which the model
never saw, are indexed with their narration. Queries are the annotators' sentences, phrased as the narrator never
does; an answer is right if its video is and it overlaps the described step by IoU 0.5 or more. The channels' weights
are fitted on the descriptions of every second test video, and all figures are of the others, among all videos. In the
last two rows every second of these has no narration, and only those are asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np

from pipelines.experiment import Corpus, prepare_corpus, pretraining
from pipelines.index import IndexConfig, build_index
from pipelines.pretrain import pretrain
from pipelines.ray_session import ray_session
from pipelines.search import open_archive
from videoclip.files import read_json, write_json
from videoclip.search.fitting import fit_fusion, read_described, score_answers

FIGURES = ("R@1", "R@5")
SILENT = "without narration: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/search-channels"), help="keeps each seed's model")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        folder = (options.output / f"seed-{seed}").absolute()
        corpus, model = prepare(seed, folder)
        for name, figures in measure(corpus, model, folder).items():
            rows.setdefault(name, []).append(figures)
            print(f"seed {seed}: {name}: {figures}", flush=True)
    print("\n| found by | R@1 | R@5 |\n|---|---|---|")
    for name, scores in rows.items():
        cells = [[score[figure] for score in scores] for figure in FIGURES]
        print(f"| {name} | " + " | ".join(f"{np.mean(cell):.1f} ± {np.std(cell):.1f}" for cell in cells) + " |")


def prepare(seed: int, folder: Path) -> tuple[Corpus, Path]:
    """The demo's corpus and model of a seed, and two indexes of its test videos; what is there already is kept."""
    with ray_session(None):
        corpus = prepare_corpus(folder, seed)
        model = folder / "pretrain" / "model"
        if not (model / "config.json").is_file():
            pretrain(pretraining(corpus, folder / "pretrain", seed))
        said = corpus.folder / "test" / "raw_caption.json"
        partly = folder / "partly-said.json"
        write_json(partly, {name: lines for name, lines in read_json(said).items() if _number(name) % 4})
        with contextlib.redirect_stdout(io.StringIO()):
            for words, output in ((said, "index-said"), (partly, "index-partly-said")):
                build_index(IndexConfig(model, corpus.test_shards, output=folder / output, captions=str(words)))
    return corpus, model


def measure(corpus: Corpus, model: Path, folder: Path) -> dict[str, dict[str, float]]:
    """R@1 and R@5 of the held-out descriptions by each way of searching."""
    described = read_described(corpus.folder / "youcookii_annotations_trainval.json")
    fitted_on = [item for item in described if _number(item.video_id) % 2]
    asked = [item for item in described if not _number(item.video_id) % 2]
    silent = [item for item in asked if not _number(item.video_id) % 4]
    archive = open_archive(model, folder / "index-said")
    rows = {by: score_answers(archive, asked, by) for by in ("picture", "words")}
    rows["both, default weights"] = score_answers(archive, asked)
    fit = fit_fusion(archive, fitted_on)
    print(f"{len(asked)} descriptions asked for, {len(fitted_on)} others fitted: {fit}", flush=True)
    archive.weigh(fit.config)
    rows["both, fitted weights"] = score_answers(archive, asked)
    partial = open_archive(model, folder / "index-partly-said")
    partial.weigh(fit.config)
    for by in ("picture", "both"):
        rows[SILENT + by] = score_answers(partial, silent, by)
    return rows


def _number(video_id: str) -> int:
    return int(video_id.rpartition("_")[2])


if __name__ == "__main__":
    main()
