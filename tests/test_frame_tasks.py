"""Retrieval by matching and open questions, on shards of frames."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.small_recipes import CONFIG, make_alpro
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.captions import NO_CAPTIONS
from videoclip.data.frame_shards import FrameShards, FramesRecord, encode_picture, write_frame_shards
from videoclip.data.frames import FrameBatch
from videoclip.data.questions import OpenQuestion
from videoclip.data.words import WordTokenizer, train_wordpiece
from videoclip.errors import InputError
from videoclip.evaluation.frames import answer_open_questions, check_size, load_frame_model, retrieve_from_frames
from videoclip.packed import Packed
from videoclip.parts.masked_words import WordMask
from videoclip.parts.towers import TowersShape
from videoclip.parts.vision_transformer import VisionShape
from videoclip.recipes import alpro, videoclip
from videoclip.training import OptimizerConfig, make_optimizer, step
from videoclip.transformer import TransformerShape

VISION = VisionShape(32, 8, 1, 2, 32, 2, 2, 64)
TEXT = TransformerShape(32, 2, 64, 2, 0.0, 16)
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture
def coloured(tmp_path: Path) -> FrameShards:
    """Three videos, each of one colour."""
    records = [
        FramesRecord(name, 2.0, [encode_picture(np.full((32, 32, 3), colour, np.uint8))] * 6, NO_CAPTIONS)
        for name, colour in COLOURS.items()
    ]
    write_frame_shards(tmp_path / "frames", records, 32)
    return FrameShards(tmp_path / "frames")


def trained(shards: FrameShards, tokenizer: WordTokenizer, **changes: object) -> alpro.Recipe:
    """Thirty steps on three coloured videos."""
    torch.manual_seed(0)
    special = tokenizer.special_ids()
    shape = TowersShape(VISION, TEXT, 1, tokenizer.vocabulary, 16)
    mask = WordMask(special["[MASK]"], tokenizer.vocabulary, tuple(special.values()))
    model = alpro.Recipe(alpro.AlproConfig(shape, entities=0, word_mask=mask, **changes))
    model.frozen.tokenizer = tokenizer
    texts = ["what is it" if model.config.answers else name for name in COLOURS]
    ids = tokenizer.clip_ids(texts, 8)
    batch = FrameBatch(
        torch.from_numpy(np.stack([shards.clip(row, 2) for row in range(3)])),
        Packed(ids.rows.long(), ids.lengths),
        torch.Generator().manual_seed(0),
        answers=torch.arange(3),
    )
    optimizer = make_optimizer(model.train(), OptimizerConfig())
    for _ in range(80):
        step(model, optimizer, batch, 3e-3, 20.0)
    return model.eval()


def test_retrieve_from_frames_finds_what_was_learned(coloured: FrameShards) -> None:
    tokenizer = train_wordpiece([*COLOURS, "what is it"], 60)
    model = trained(coloured, tokenizer, losses=("vtc", "vtm"))
    clips = [AnnotatedClip(name, 0.0, None, (name,)) for name in COLOURS]
    found, listed = retrieve_from_frames(model, coloured, [*clips, AnnotatedClip("absent", 0.0, None, ("x",))])
    assert found["R@1"] == found["video_to_text"]["R@1"] == 100
    assert found["dropped"] == 1 and found["queries"] == 3 and listed[1]["found"] == "green"
    assert retrieve_from_frames(model, coloured, clips, best=2)[0]["R@1"] == 100
    twice = [*clips, AnnotatedClip("red", 0.0, 2.0, ("red", "red"))]
    assert "video_to_text" not in retrieve_from_frames(model, coloured, twice)[0]
    with pytest.raises(InputError, match="none of the 1 annotated clips"):
        retrieve_from_frames(model, coloured, [AnnotatedClip("absent", 0.0, None, ("x",))])


def test_questions_are_answered_from_frames(coloured: FrameShards) -> None:
    tokenizer = train_wordpiece([*COLOURS, "what is it"], 60)
    model = trained(coloured, tokenizer, losses=(), answers=3, answer_names=tuple(COLOURS))
    questions = [OpenQuestion(name, "what is it", name, "what") for name in COLOURS]
    metrics, given = answer_open_questions(model, coloured, questions)
    assert metrics["accuracy"] == metrics["accuracy_what"] == 100 and given[1]["answer"] == "green"
    model.config = replace(model.config, answer_names=("red", "green"))
    with pytest.raises(InputError, match="chooses from 3 answers and knows 2"):
        answer_open_questions(model, coloured, questions)
    with pytest.raises(InputError, match="trained with answers"):
        model(FrameBatch(torch.zeros(1, 2, 32, 32, 3).byte(), Packed.of([torch.tensor([2, 3])])))


def test_frames_of_another_size_and_models_of_tokens_are_refused(coloured: FrameShards, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model reads 16 x 16: extract frames with --size 16"):
        check_size(make_alpro(), coloured)
    videoclip.Recipe(CONFIG).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="a videoclip, which reads tokens"):
        load_frame_model(tmp_path / "model")
