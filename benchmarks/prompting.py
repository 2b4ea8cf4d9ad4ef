"""Efficient-Prompt on the kitchen: learned prompts, hand-written ones, linear probes, and what the text side costs.

The frozen dual encoder is one of ours (`kitchen_frames.py`): pictures are described by a random network that sees
single frames, and a VideoCLIP is trained on (one frame, what the narrator says meanwhile). No motion is inside. Actions
come in four pairs that share every picture and differ in order and pace alone. A clip is 16 consecutive frames, 2
seconds, of one step; test steps are of held-out videos. Every row is trained the same number of steps on the same
clips, the last step is reported, and nothing is chosen on test steps. Finished seeds are kept in --output.

    python benchmarks/prompting.py                 # the tables of docs/systems.md
    python benchmarks/prompting.py --cost          # the text side, cut behind the end word, against the release's 77
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kitchen_frames import KEPT, WIDTH, Steps, dual_encoder, kitchen_steps
from torch import Tensor, nn

from videoclip.data.action_clips import ActionBatch
from videoclip.files import write_json
from videoclip.model import VideoCLIP
from videoclip.packed import Packed
from videoclip.parts.clip import Clip, ClipConfig
from videoclip.parts.prompts import Prompts, TemporalTransformer
from videoclip.recipes.prompting import Options, prompted
from videoclip.synthetic.kitchen.vocabulary import ACTIONS, INGREDIENTS

FRAMES, BATCH, DECAY = 16, 64, 0.01
LEARNING_RATE = 2e-3
FEW = 80  # videos, of which a temporal layer learns the looks instead
ACTION_NAMES = [action.spoken[0][0] for action in ACTIONS]
INGREDIENT_NAMES = [word.spoken[0] for word, _, _ in INGREDIENTS]
PAIRS = [(a, i) for a in range(len(ACTIONS)) for i in range(len(INGREDIENTS))]
TEMPLATES = (
    "{}",
    "a video of {}",
    "we are going to {}",
    "now {} your",
    "i like to {} my",
    "just keep going with the {}",
    "start with this {}",
    "as you can see here {}",
)


# --- One task -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Which class every step belongs to, by number in `names`; -1: not part of the task."""

    names: list[str]
    train: np.ndarray
    test: np.ndarray


class Bench:
    """Frozen frame features of one corpus, and everything that is trained on top of them."""

    def __init__(self, model: VideoCLIP, splits: dict[str, Steps], seed: int, steps: int) -> None:
        self.model, self.seed, self.steps = model, seed, steps
        self.features = {}  # split -> (S, KEPT, H)
        frozen = prompted(Options(prefix=0, postfix=0, layers=0), model)
        for split, clips in splits.items():
            tokens = torch.from_numpy(clips.frames).flatten(0, 1)
            rows = [frozen.frame_features(Packed(piece, torch.tensor([len(piece)]))) for piece in tokens.split(8192)]
            self.features[split] = Packed.together(rows).rows.unflatten(0, (-1, KEPT))

    def train_batch(
        self, generator: np.random.Generator, rows: np.ndarray, labels: np.ndarray, names: Packed
    ) -> ActionBatch:
        """Clips of 16 consecutive frames of steps drawn from `rows`."""
        chosen = generator.choice(rows, BATCH)
        first = generator.integers(KEPT - FRAMES + 1, size=BATCH)
        clips = self.features["train"][chosen[:, None], first[:, None] + np.arange(FRAMES)]
        return ActionBatch(_packed(clips), names, torch.from_numpy(labels[chosen]))

    def clips(self, split: str, rows: np.ndarray) -> Packed:
        """The middle 16 frames of what there is of steps."""
        first = (KEPT - FRAMES) // 2
        return _packed(self.features[split][rows, first : first + FRAMES])

    def pace_by_hand(self, labels: dict[str, np.ndarray]) -> float:
        """Percent of test steps whose action is told from its partner by how much further frames differ that are four
        apart than two apart: fast actions repeat after four. Which is more is read off the training steps."""
        ratios = {}
        for split in ("train", "test"):
            frames = self.features[split]  # (S, KEPT, H)
            far, near = ((frames[:, k:] - frames[:, :-k]).norm(dim=2).mean(1) for k in (4, 2))
            ratios[split] = (far / near).numpy()
        right = np.zeros(len(labels["test"]), bool)
        for action in range(0, len(ACTIONS), 2):
            one, other = (ratios["train"][labels["train"] == action + i].mean() for i in range(2))
            answer = action + (np.abs(ratios["test"] - other) < np.abs(ratios["test"] - one))
            right |= answer == labels["test"]
        return 100 * float(right.mean())

    def names(self, task: Task, template: str = "{}") -> Packed:
        return self.model.tokenizer().clip_ids([template.replace("{}", name) for name in task.names], 24)

    def fit(
        self, modules: nn.Module, loss_of: Callable[[ActionBatch], Tensor], task: Task, rows: np.ndarray, steps: int
    ) -> None:
        """Train with the same clips for every row of a table."""
        generator = np.random.default_rng([self.seed, 11])
        names = self.names(task)
        trained = [p for p in modules.parameters() if p.requires_grad and p.numel()]
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=DECAY)
        for _ in range(steps):
            loss = loss_of(self.train_batch(generator, rows, task.train, names))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def prompts(self, task: Task, each: int, layers: int, rows: np.ndarray | None = None, steps: int = 0) -> Tensor:
        """Logits [S, C] of the test steps; `each` vectors on both sides, `layers` temporal layers."""
        torch.manual_seed(self.seed)
        recipe = prompted(Options(prefix=each, postfix=each, frames=FRAMES, layers=layers, heads=4), self.model)
        if each or layers:
            rows = np.flatnonzero(task.train >= 0) if rows is None else rows
            self.fit(recipe, lambda batch: recipe(batch)["loss"], task, rows, steps or self.steps)
        with torch.no_grad():
            return recipe.class_logits(self.clips("test", np.arange(len(task.test))), self.names(task))

    def hand_written(self, task: Task) -> Tensor:
        """Logits of the test steps with the template that is best on training steps."""
        recipe = prompted(Options(prefix=0, postfix=0, layers=0), self.model)
        rows = np.flatnonzero(task.train >= 0)
        clips, labels = self.clips("train", rows), torch.from_numpy(task.train[rows])
        best = max(TEMPLATES, key=lambda t: accuracy(recipe.class_logits(clips, self.names(task, t)), labels))
        return recipe.class_logits(self.clips("test", np.arange(len(task.test))), self.names(task, best))

    def probe(self, task: Task, layers: int, rows: np.ndarray | None = None, steps: int = 0) -> Tensor:
        """Logits of a linear probe on the mean frame, or on the temporal transformer."""
        torch.manual_seed(self.seed)
        body = TemporalTransformer(WIDTH, FRAMES, layers, 4).requires_grad_(layers > 0)
        head = nn.Linear(WIDTH, len(task.names))
        both = nn.ModuleList([body, head])

        def scores(frames: Packed) -> Tensor:
            # Features are of unit length; the text side divides by 0.07, so that the probe's may be as large.
            return head(F.normalize(body(frames), dim=-1) / 0.07)

        rows = np.flatnonzero(task.train >= 0) if rows is None else rows
        self.fit(both, lambda b: F.cross_entropy(scores(b.frames), b.labels), task, rows, steps or self.steps)
        with torch.no_grad():
            return scores(self.clips("test", np.arange(len(task.test))))


def _packed(clips: Tensor) -> Packed:
    return Packed(clips.flatten(0, 1), torch.full((len(clips),), clips.shape[1]))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the labelled rows (label >= 0) whose class is first."""
    known = labels >= 0
    return 100 * (logits[known].argmax(1) == labels[known]).float().mean().item()


def within_pair(logits: Tensor, labels: Tensor) -> float:
    """Percent right of the two actions that share a step's pictures."""
    partner = labels ^ 1
    rows = torch.arange(len(labels))
    return 100 * (logits[rows, labels] > logits[rows, partner]).float().mean().item()


# --- Tables -------------------------------------------------------------------------------------------------------


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every figure of one corpus: row -> column -> percent."""
    splits = kitchen_steps(seed, options.videos, options.output)
    names = [*ACTION_NAMES, *INGREDIENT_NAMES, *TEMPLATES]
    model = dual_encoder(splits["train"], names, seed, options.encoder_steps)
    bench = Bench(model, splits, seed, options.steps)
    train, test = splits["train"], splits["test"]
    actions = Task(ACTION_NAMES, train.action, test.action)
    ingredients = Task(INGREDIENT_NAMES, train.ingredient, test.ingredient)
    table: dict[str, dict[str, float]] = {}

    def note(row: str, column: str, value: float) -> None:
        table.setdefault(row, {})[column] = value
        print(f"seed {seed}: {row:32s} {column:16s} {value:5.1f}", flush=True)

    few = np.arange(len(train.action) * min(FEW, options.videos) // options.videos)
    rows: list[tuple[str, Callable[[Task], Tensor]]] = [
        ("bare name (0+X+0)", lambda task: bench.prompts(task, 0, 0)),
        ("hand-written", bench.hand_written),
        ("learned 4+X+4", lambda task: bench.prompts(task, 4, 0)),
        ("learned 16+X+16", lambda task: bench.prompts(task, 16, 0)),
        ("linear probe, mean frame", lambda task: bench.probe(task, 0)),
    ]
    temporal: list[tuple[str, Callable[[Task], Tensor]]] = [
        ("learned 16+X+16, 1 temporal layer", lambda task: bench.prompts(task, 16, 1)),
        (f"the same, of {FEW} videos only", lambda task: bench.prompts(task, 16, 1, few)),
        ("linear probe, 1 temporal layer", lambda task: bench.probe(task, 1)),
    ]
    labels = torch.from_numpy(test.action)
    for name, logits_of in [*rows, *temporal]:
        logits = logits_of(actions)
        note(name, "action", accuracy(logits, labels))
        note(name, "within pair", within_pair(logits, labels))
    for name, logits_of in rows:
        note(name, "ingredient", accuracy(logits_of(ingredients), torch.from_numpy(test.ingredient)))
    note("difference of frames, by hand", "within pair", bench.pace_by_hand({k: v.action for k, v in splits.items()}))
    _pairs(bench, train, test, seed, note)
    _few_shots(bench, {"action": actions, "ingredient": ingredients}, seed, options.steps // 2, note)
    return table


def _pairs(bench: Bench, train: Steps, test: Steps, seed: int, note: Callable[[str, str, float], None]) -> None:
    """Action and ingredient together, a quarter of the pairs unseen in training."""
    order = np.random.default_rng([seed, 13]).permutation(len(PAIRS))
    unseen = np.zeros(len(PAIRS), bool)
    unseen[order[: len(PAIRS) // 4]] = True
    of_train, of_test = (clips.action * len(INGREDIENTS) + clips.ingredient for clips in (train, test))
    names = [f"{ACTION_NAMES[a]} {INGREDIENT_NAMES[i]}" for a, i in PAIRS]
    task = Task(names, np.where(unseen[of_train], -1, of_train), of_test)
    rows: list[tuple[str, Callable[[], Tensor]]] = [
        ("bare name (0+X+0)", lambda: bench.prompts(task, 0, 0)),
        ("hand-written", lambda: bench.hand_written(task)),
        ("learned 4+X+4", lambda: bench.prompts(task, 4, 0)),
        ("learned 4+X+4, 1 temporal layer", lambda: bench.prompts(task, 4, 1)),
        ("linear probe, mean frame", lambda: bench.probe(task, 0)),
    ]
    for name, logits_of in rows:
        logits = logits_of()
        note(name, "seen pair", accuracy(logits, torch.from_numpy(np.where(unseen[of_test], -1, of_test))))
        # Among the unseen pairs only, as the paper tests open sets.
        open_set = torch.from_numpy(np.where(unseen[of_test], of_test, -1))
        note(name, "unseen pair", accuracy(logits.masked_fill(~torch.from_numpy(unseen), -torch.inf), open_set))


def _few_shots(
    bench: Bench, tasks: dict[str, Task], seed: int, steps: int, note: Callable[[str, str, float], None]
) -> None:
    for shots in (1, 2, 5, 10):
        for column, task in tasks.items():
            generator = np.random.default_rng([seed, 17, shots])
            rows = np.concatenate(
                [generator.permutation(np.flatnonzero(task.train == label))[:shots] for label in range(len(task.names))]
            )
            labels = torch.from_numpy(task.test)
            note(f"learned 4+X+4, {shots} a class", column, accuracy(bench.prompts(task, 4, 0, rows, steps), labels))
            note(f"linear probe, {shots} a class", column, accuracy(bench.probe(task, 0, rows, steps), labels))


def tables(options: argparse.Namespace) -> None:
    """Mean and standard error over seeds; those that are finished already are used again."""
    seeds = []
    setting = {"videos": options.videos, "steps": options.steps, "encoder_steps": options.encoder_steps}
    for seed in options.seeds:
        path = options.output / f"seed-{seed}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("setting") != setting:
            stored = {"setting": setting, "table": one_seed(seed, options)}
            write_json(path, stored)
        seeds.append(stored["table"])
    columns = ["action", "within pair", "ingredient", "seen pair", "unseen pair"]
    print("\n| | action (chance 12.5) | within its pair (50) | ingredient (8.3) | seen pair | unseen pair |")
    print("|---|---|---|---|---|---|")
    for row in seeds[0]:
        cells = []
        for column in columns:
            values = [table[row][column] for table in seeds if column in table[row]]
            error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{error}" if values else "")
        print(f"| {row} | " + " | ".join(cells) + " |")


# --- What the text side costs -------------------------------------------------------------------------------------


def cost(repeats: int) -> None:
    """Four layers of CLIP's text side, forward and backward, 24 names at 16+X+16: cut, and all 77 positions."""
    torch.manual_seed(0)
    clip = Clip(ClipConfig(vocabulary=1000, image_width=0, layers=4)).requires_grad_(False)
    for parameter in (clip.positional_embedding, clip.text_projection):
        nn.init.normal_(parameter, std=0.02)
    prompts = Prompts(512, 16, 16, "absolute", 77)
    generator = np.random.default_rng(0)
    words = [[998, *generator.integers(0, 900, generator.integers(1, 4)), 999] for _ in range(24)]
    ids = Packed.of([torch.tensor(row) for row in words])
    best = {"cut": np.inf, "whole": np.inf}
    embedded = {}
    for _ in range(repeats):
        for name in best:
            started = time.process_time()
            vectors = prompts(clip.word_vectors(ids))
            embedded[name] = clip.embed_word_vectors(vectors) if name == "cut" else _as_released(clip, prompts, vectors)
            embedded[name].square().sum().backward()
            best[name] = min(best[name], time.process_time() - started)
    difference = (embedded["cut"] - embedded["whole"]).abs().max() / embedded["whole"].abs().max()
    print(f"all 77 positions, as the release: {best['whole']:6.2f} s of one core")
    print(f"cut behind the end word:          {best['cut']:6.2f} s")
    print(f"ratio {best['cut'] / best['whole']:.2f}; embeddings differ by {difference:.0e}, relative")


def _as_released(clip: Clip, prompts: Prompts, vectors: Packed) -> Tensor:
    """Every name filled up to 77 positions with the rows of the table that stand there."""
    whole = [
        torch.cat([rows, prompts.embedding.weight[len(rows) :]]) + clip.positional_embedding for rows in vectors.split()
    ]
    x = clip.transformer(Packed.of(whole))
    ends = torch.arange(len(vectors)) * clip.config.positions + vectors.lengths - 1
    return clip.ln_final(x.rows[ends]) @ clip.text_projection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--videos", type=int, default=600, help="of the training split")
    parser.add_argument("--steps", type=int, default=800, help="of every row")
    parser.add_argument("--encoder-steps", type=int, default=400, help="of the dual encoder that is frozen then")
    parser.add_argument("--output", type=Path, default=Path("runs/prompting-benchmark"))
    parser.add_argument("--cost", action="store_true", help="only what the text side costs")
    parser.add_argument("--repeats", type=int, default=5, help="of --cost")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cost:
        cost(options.repeats)
        return
    tables(options)


if __name__ == "__main__":
    main()
