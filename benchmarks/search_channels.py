"""What the words are worth beside the picture: moments of narrated videos, found by descriptions nobody ever said.

For each of three seeds a kitchen corpus and a model trained on its training half. The test videos, which the model
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

from pipelines.experiment import prepare_corpus, pretraining
from pipelines.index import IndexConfig, build_index
from pipelines.pretrain import pretrain
from pipelines.ray_session import ray_session
from pipelines.search import open_archive
from videoclip.files import read_json, write_json
from videoclip.search.fitting import Described, fit_fusion, read_described, score_answers

EPOCHS = 20
FIGURES = ("R@1", "R@5")
SILENT = "without narration: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/search-channels"))
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for name, figures in measure(seed, options.output / f"seed-{seed}").items():
            rows.setdefault(name, []).append(figures)
            print(f"seed {seed}: {name}: {figures}", flush=True)
    print("\n| found by | R@1 | R@5 |\n|---|---|---|")
    for name, scores in rows.items():
        cells = [[score[figure] for score in scores] for figure in FIGURES]
        print(f"| {name} | " + " | ".join(f"{np.mean(cell):.1f} ± {np.std(cell):.1f}" for cell in cells) + " |")


def measure(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """R@1 and R@5 of the held-out descriptions by each way of searching."""
    with ray_session(None):
        corpus = prepare_corpus(folder, seed, None)
        model = pretrain(pretraining(corpus, folder / "pretrain", seed, EPOCHS)).model
        described = read_described(corpus.folder / "youcookii_annotations_trainval.json")
        fitted_on = [item for item in described if _number(item) % 2]
        asked = [item for item in described if not _number(item) % 2]
        silent = [item for item in asked if not _number(item) % 4]
        said = corpus.folder / "test" / "raw_caption.json"
        partly = folder / "partly-said.json"
        kept = {name: lines for name, lines in read_json(said).items() if int(name.rpartition("_")[2]) % 4}
        write_json(partly, kept)
        index, partly_index = folder / "index", folder / "partly-index"
        with contextlib.redirect_stdout(io.StringIO()):
            for words, output in ((said, index), (partly, partly_index)):
                build_index(IndexConfig(model, corpus.test_shards, output=output, captions=str(words)))
    archive = open_archive(model, index)
    rows = {by: score_answers(archive, asked, by) for by in ("picture", "words")}
    rows["both, default weights"] = score_answers(archive, asked)
    fit = fit_fusion(archive, fitted_on)
    print(f"seed {seed}: fitted: {fit}", flush=True)
    archive.weigh(fit.config)
    rows["both, fitted weights"] = score_answers(archive, asked)
    partial = open_archive(model, partly_index)
    partial.weigh(fit.config)
    for by in ("picture", "both"):
        rows[SILENT + by] = score_answers(partial, silent, by)
    return rows


def _number(item: Described) -> int:
    return int(item.video_id.rpartition("_")[2])


if __name__ == "__main__":
    main()
