"""Frozen towers on the kitchen: what narration adds to a frozen two-tower model, and what it makes it forget.

A small CLIP (transformers' own) is trained on single frames and written captions of one channel, and frozen. As a CLIP
of the web does, it has read every word that the narrator uses, but no narration: captions name things by all their
names, in the grammar of captions. It makes the tokens of another channel, which has narration only. On top, at equal
steps and on the same clips: the residual recipe without and with a penalty, and a VideoCLIP from scratch on the same
tokens. All are asked with a phrase that the narrator says about each held-out step, and with its written caption.

    python benchmarks/towers.py            # the table of docs/systems.md
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.captions import Captions
from videoclip.data.clips import ClipConfig, ClipSampler
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.words import WordTokenizer
from videoclip.encoders.image import HIDDEN, ImageEncoder
from videoclip.evaluation.retrieval import retrieve_clips
from videoclip.files import write_json
from videoclip.recipes import towers, videoclip
from videoclip.synthetic.kitchen import KitchenConfig, KitchenVideo, caption, narrate, narrate_phrases, plan_kitchen
from videoclip.synthetic.kitchen.pictures import SIZE, draw_frames
from videoclip.synthetic.kitchen.plan import Step
from videoclip.synthetic.kitchen.vocabulary import ACTIONS, INGREDIENTS, PLACES, VESSELS, WRITTEN, Word
from videoclip.training import OptimizerConfig, learning_rate_at, make_optimizer, step

MAX_SECONDS, MAX_WORDS, VIDEOS_PER_BATCH, FRAMES_A_SECOND = 12, 28, 16, 2
ROWS = ("frozen, no training", "residual", "residual, penalty 1", "from scratch")
RATES = {"residual": 1e-3, "scratch": 3e-3}  # the better of these two for each, on seed 0
CLIPS = ClipConfig(clips_per_video=8, min_words=4, max_words=14, min_seconds=3, max_seconds=MAX_SECONDS)


def word_tokenizer(texts: list[str]) -> WordTokenizer:
    """One id a word, with CLIP's start word and its end word, which has the largest id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<unk>", *sorted({word for text in texts for word in text.lower().split()})]
    ids = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(ids, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, ids[name]) for name in ("<|startoftext|>", "<|endoftext|>")]
    tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", None, ends)
    return WordTokenizer(tokenizer)


def train_clip(videos: list[KitchenVideo], words: WordTokenizer, seed: int, steps: int, folder: Path) -> None:
    """A CLIP of (one frame, the step's written caption), saved as the hub has models."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {
        "vocab_size": words.vocabulary, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 384, "max_position_embeddings": MAX_WORDS + 2, "bos_token_id": words.cls_id,
        "eos_token_id": words.sep_id, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384,
        "image_size": SIZE, "patch_size": 8,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    pictures, shown = _pictures(videos)
    generator = np.random.default_rng([seed, 3])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (number + 1) / 40) * (1 - number / steps)
        chosen = generator.choice(len(shown), min(96, len(shown)), replace=False)
        frames = np.stack([pictures[i][generator.integers(len(pictures[i]))] for i in chosen])
        images = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        captions = [described(shown[i], generator) for i in chosen]
        ids, mask = words.clip_ids(captions, MAX_WORDS).padded()
        output = model(input_ids=ids.long(), attention_mask=mask.long(), pixel_values=images)
        target = torch.arange(len(chosen))
        loss = F.cross_entropy(output.logits_per_image, target) + F.cross_entropy(output.logits_per_text, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    words.save(folder)
    preparation = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))


def described(step: Step, generator: np.random.Generator) -> str:
    """A written caption, in which everything goes by any of its names."""

    def named(words: Word) -> str:
        *rest, last = words.written.split()
        return " ".join([*rest, generator.choice([last, *words.spoken])])

    action, ingredient = ACTIONS[step.action], named(INGREDIENTS[step.ingredient][0])
    where = [named(VESSELS[step.vessel][0]), named(PLACES[step.place][0])]
    doing = [f"{ingredient} {action.written}", *(f"{ing} {ingredient}" for _, ing in action.spoken)]
    parts = [str(generator.choice(doing)), *where]
    return " ".join(parts if generator.random() < 0.5 else [parts[2], *parts[:2]])


def _pictures(videos: list[KitchenVideo]) -> tuple[list[np.ndarray], list[Step]]:
    """Two frames a second of every step, uint8 [n, SIZE, SIZE, 3], and the steps."""
    pictures, steps = [], []
    for video in videos:
        for one in video.steps:
            times = np.arange(one.start + 0.1, one.end, 1 / FRAMES_A_SECOND)
            pictures.append(draw_frames(video, times, np.random.default_rng([video.seed, 6])))
            steps.append(one)
    return pictures, steps


def write_shards(videos: list[KitchenVideo], config: KitchenConfig, encoder: ImageEncoder, folder: Path) -> Shards:
    """Tokens of two frames a second, with the narration."""
    writer = ShardWriter(folder, Manifest(encoder.name, encoder.fingerprint(), encoder.dimension))
    encoder.save(folder)
    for video in videos:
        times = np.arange(FRAMES_A_SECOND * video.duration) / FRAMES_A_SECOND
        frames = draw_frames(video, times, np.random.default_rng([video.seed, 7]))
        clips = frames.reshape(-1, FRAMES_A_SECOND, SIZE, SIZE, 3)
        tokens = np.concatenate([encoder.encode_clips(clips[i : i + 32]) for i in range(0, len(clips), 32)])
        lines = narrate(video, config)
        told = Captions(np.float32(lines["start"]), np.float32(lines["end"]), lines["text"])  # type: ignore[arg-type]
        writer.add(VideoRecord(video.video_id, float(video.duration), tokens.astype(np.float16), told))
    writer.close()
    return Shards(folder)


def questions(videos: list[KitchenVideo], config: KitchenConfig) -> dict[str, list[AnnotatedClip]]:
    """Held-out steps with the longest phrase that the narrator says about them, and with what is written about them."""
    asked: dict[str, list[AnnotatedClip]] = {"narrated": [], "written": []}
    for video in videos:
        phrases = narrate_phrases(video, config)
        for number, one in enumerate(video.steps):
            said = [phrase.text for phrase in phrases if phrase.step == number]
            where = (video.video_id, float(round(one.start)), float(round(one.end)))
            if said:
                asked["narrated"].append(AnnotatedClip(*where, (max(said, key=len),)))
                asked["written"].append(AnnotatedClip(*where, (caption(one, WRITTEN[0]),)))
    return asked


def train(recipe: Any, sampler: ClipSampler, seed: int, steps: int, learning_rate: float) -> None:
    """The same clips in the same order for every recipe."""
    generator = np.random.default_rng([seed, 5])
    config = OptimizerConfig(learning_rate, warmup_steps=30, weight_decay=0.01)
    optimizer = make_optimizer(recipe.train(), config)
    rows = sampler.usable_rows()
    for number in range(steps):
        batch = sampler.batch(generator.choice(rows, VIDEOS_PER_BATCH, replace=False), generator)
        step(recipe, optimizer, batch, learning_rate_at(number, steps, config), config.clip_norm)
    recipe.eval()


def one_seed(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """R@1 of every row."""
    written_channel = plan_kitchen(KitchenConfig(seed=1000 + seed, train_videos=options.written, test_videos=0))
    config = KitchenConfig(seed=seed, train_videos=options.narrated)
    narrated_channel = plan_kitchen(config)
    texts = [text for video in narrated_channel for text in narrate(video, config)["text"]]
    generator = np.random.default_rng([seed, 8])
    texts += [described(one, generator) for video in written_channel for one in video.steps for _ in range(20)]
    texts += [caption(one, template) for video in written_channel for one in video.steps for template in WRITTEN]
    words = word_tokenizer(texts)
    train_clip(written_channel, words, seed, options.clip_steps, folder / "clip")
    encoder = ImageEncoder.from_pretrained(f"{folder / 'clip'}{HIDDEN}")
    shards = {
        split: write_shards([v for v in narrated_channel if v.split == split], config, encoder, folder / split)
        for split in ("train", "test")
    }
    asked = questions([v for v in narrated_channel if v.split == "test"], config)
    sampler = ClipSampler(shards["train"], words, CLIPS, folder / "words")
    small = towers.Options(
        encoder=str(folder / "train"), hidden_width=128, layers=1, max_seconds=MAX_SECONDS, max_words=MAX_WORDS
    )
    scratch = videoclip.Options(
        width=128, layers=2, heads=4, dropout=0.0, max_seconds=MAX_SECONDS, max_words=MAX_WORDS, temperature=0.05
    )
    figures: dict[str, dict[str, float]] = {}
    for row in ROWS:
        torch.manual_seed(seed)
        manifest = shards["train"].manifest
        model: Any
        if row == ROWS[0]:
            model = towers.frozen_towers(folder / "train")
        elif row == ROWS[-1]:
            model = videoclip.build(scratch, manifest, words)
        else:
            penalty = float(row.rpartition(" ")[2]) if "penalty" in row else 0.0
            model = towers.build(replace(small, penalty=penalty), manifest, words)
            _check_step_zero(model, towers.frozen_towers(folder / "train"), shards["test"], asked)
        if row != ROWS[0]:
            rate = RATES["scratch" if row == ROWS[-1] else "residual"]
            train(model, sampler, seed, options.steps, rate)
        figures[row] = {}
        for name, clips in asked.items():
            metrics, _ = retrieve_clips(model, shards["test"], clips)
            figures[row][name], figures[row]["chance"] = metrics["R@1"], metrics["chance_R@1"]
        print(f"seed {seed}: {row:22s} " + "  ".join(f"{k} {v:5.1f}" for k, v in figures[row].items()), flush=True)
    return figures


def _check_step_zero(model: Any, frozen: Any, shards: Shards, asked: dict[str, list[AnnotatedClip]]) -> None:
    """Every rank of the untrained residual model is the frozen model's."""
    for clips in asked.values():
        clips = [replace(clip, end=min(clip.end or 0.0, clip.start + MAX_SECONDS)) for clip in clips]
        ranks = [[row["rank"] for row in retrieve_clips(m, shards, clips)[1]] for m in (model.eval(), frozen)]
        if ranks[0] != ranks[1]:
            raise AssertionError("step 0 is not the frozen model")


def main() -> None:
    """Run every seed that is not finished, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--written", type=int, default=80, help="videos with captions, for the CLIP that is frozen")
    parser.add_argument("--narrated", type=int, default=80, help="videos with narration, to train with")
    parser.add_argument("--clip-steps", type=int, default=600, help="of the CLIP")
    parser.add_argument("--steps", type=int, default=150, help="on narration")
    parser.add_argument("--output", type=Path, default=Path("runs/towers-benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = {name: value for name, value in vars(options).items() if name not in ("seeds", "output")}
    seeds = []
    for seed in options.seeds:
        path = options.output / f"seed-{seed}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("setting") != setting:
            with TemporaryDirectory() as folder:
                stored = {"setting": setting, "figures": one_seed(seed, options, Path(folder))}
            write_json(path, stored)
        seeds.append(stored["figures"])
    chance = np.mean([figures[ROWS[0]]["chance"] for figures in seeds])
    print(f"\n| R@1, {len(seeds)} seeds (chance {chance:.1f}) | narrated queries | written captions |")
    print("|---|---|---|")
    for row in ROWS:
        cells = []
        for name in ("narrated", "written"):
            values = [figures[row][name] for figures in seeds]
            each = ", ".join(f"{value:.1f}" for value in values)
            cells.append(f"{np.mean(values):.1f} ({each})")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
