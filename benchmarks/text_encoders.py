"""The demo's text side several ways: a vocabulary fitted to the captions, and frozen pretrained encoders.

Needs a finished demo (`make demo`) for its tokens, and `--text` with folders or hub ids of encoders, such as
sentence-transformers/all-MiniLM-L6-v2. Trains all from the same shards with the same steps and prints retrieval,
moments and the seconds that pretraining took.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from pipelines.experiment import Corpus, evaluate, pretraining
from pipelines.pretrain import pretrain
from pipelines.ray_session import ray_session


def main() -> None:
    """Print one row for each text side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=Path("runs/text_encoders"))
    parser.add_argument("--text", nargs="*", default=[], help="folders or hub ids of frozen text encoders to compare")
    options = parser.parse_args()
    if not (options.demo / "tokens").exists():
        print("needs a finished demo (`make demo`). Skipped.")
        sys.exit(0)
    corpus = Corpus(options.demo / "corpus", [], options.demo / "tokens" / "train", options.demo / "tokens" / "test")
    texts = {"wordpiece": "wordpiece", **{Path(text).name: text for text in options.text}}
    with ray_session(None):
        for name, text in texts.items():
            start = time.perf_counter()
            run = replace(pretraining(corpus, options.output / name, seed=0), text=text)
            model = pretrain(run).model
            seconds = time.perf_counter() - start
            retrieval, moments = evaluate(corpus, model, options.output / name / "evaluation")
            print(
                f"\n{name:24s} R@1 {retrieval['R@1']:6.2f}  R@10 {retrieval['R@10']:6.2f}  "
                f"MR-full-R1@0.5 {moments['brief']['MR-full-R1@0.5']:6.2f}  pretraining {seconds:6.0f} s"
            )


if __name__ == "__main__":
    main()
