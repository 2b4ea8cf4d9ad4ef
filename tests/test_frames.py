"""Clips of a few frames: which are chosen, how they lie on disk, and what is asked about them."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from videoclip.data.captions import NO_CAPTIONS, Captions
from videoclip.data.entities import frequent_nouns, read_captioned, read_entities
from videoclip.data.frame_shards import FrameShards, FramesRecord, decode_picture, encode_picture, write_frame_shards
from videoclip.data.frames import DRAWING, SAMPLERS, choose_frames, random_crop_of_patches
from videoclip.data.questions import OpenQuestion, frequent_answers, read_answers, read_questions
from videoclip.errors import InputError
from videoclip.evaluation.matching import answer_metrics, matching_matrix, ranks_of_columns, release_scores
from videoclip.packed import Packed
from videoclip.parts.fusion import first_rows

# --- Which frames -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 16), st.sampled_from(SAMPLERS), st.integers(0, 9))
def test_every_sampler_chooses_frames_of_the_video_in_order(count: int, wanted: int, sampler: str, seed: int) -> None:
    chosen = choose_frames(count, wanted, sampler, np.random.default_rng(seed))
    assert chosen.shape == (wanted,) and chosen.min() >= 0 and chosen.max() < count
    assert (np.diff(chosen) >= 0).all()
    if count >= 2 * wanted:
        assert len(set(chosen.tolist())) == wanted
    if sampler not in DRAWING:
        assert (chosen == choose_frames(count, wanted, sampler)).all()


def test_the_releases_arithmetic_steps_by_whole_frames_and_ours_does_not() -> None:
    assert choose_frames(300, 8, "release-uniform").tolist() == [0, 37, 74, 111, 148, 185, 222, 259]
    assert choose_frames(300, 8, "uniform").tolist() == [0, 37, 75, 112, 150, 187, 225, 262]


def test_headtail_takes_half_from_each_half_and_dense_neighbours() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        chosen = choose_frames(100, 4, "headtail", generator)
        assert chosen[1] < 50 <= chosen[2]
        assert np.diff(choose_frames(100, 5, "dense", generator, stride=3)).tolist() == [3, 3, 3, 3]
    assert choose_frames(100, 4, "dense").tolist() == [48, 49, 50, 51]


def test_samplers_that_cannot_are_refused() -> None:
    with pytest.raises(InputError, match="draws: it needs a generator"):
        choose_frames(10, 2, "random")
    with pytest.raises(InputError, match="sampler must be one of"):
        choose_frames(10, 2, "first")
    with pytest.raises(InputError, match="chosen from 0"):
        choose_frames(0, 2)


def test_crops_are_as_the_release_draws_them() -> None:
    """At 14 x 14 patches: mean area 0.335, 30% below 0.3, two of three taller than wide."""
    generator = np.random.default_rng(0)
    crops = np.array([random_crop_of_patches(14, generator) for _ in range(4000)])
    assert ((crops[:, :2] + crops[:, 2:]) <= 14).all() and (crops[:, :2] >= 0).all()
    area = crops[:, 2] * crops[:, 3] / 196
    assert area.mean() == pytest.approx(0.335, abs=0.01) and area.min() > 0.2 and area.max() < 0.5
    assert (area < 0.3).mean() == pytest.approx(0.30, abs=0.04)
    assert (crops[:, 2] > crops[:, 3]).mean() == pytest.approx(0.67, abs=0.04)


# --- On disk ----------------------------------------------------------------------------------------------------------


def pictures(count: int, size: int = 16) -> list[np.ndarray]:
    return [np.full((size, size, 3), 10 * number, np.uint8) for number in range(count)]


def test_a_clip_reads_its_own_frames_alone(tmp_path: Path) -> None:
    captions = Captions(np.array([0.5], np.float32), np.array([1.5], np.float32), ["stir"])
    frames = [encode_picture(picture, quality=0) for picture in pictures(20)]
    frames[7] = b"damaged"
    records = [FramesRecord("a", 4.0, frames, captions), FramesRecord("b", 1.0, frames[:3], NO_CAPTIONS)]
    write_frame_shards(tmp_path / "s", records, 16, videos_per_part=1)
    shards = FrameShards(tmp_path / "s", verify=True)
    assert (len(shards), shards.video_ids(), shards.count(0), shards.fps(1)) == (2, ["a", "b"], 20, 1.0)
    assert shards.captions(0).text == ["stir"]
    clip = shards.clip(0, 4, start=2.0, end=4.0)  # frames 8 to 15
    assert clip[:, 0, 0, 0].tolist() == [80, 100, 120, 140]
    assert shards.clip(1, 5)[:, 0, 0, 0].tolist() == [0, 0, 10, 10, 20], "a short video repeats frames"
    with pytest.raises(InputError, match="video 'a', frame 7: not a whole JPEG or PNG"):
        shards.frames(0, np.array([7]))
    with pytest.raises(InputError, match="no frame between"):
        shards.clip(1, 2, start=3.0)
    with pytest.raises(InputError, match="holds shards already"):
        write_frame_shards(tmp_path / "s", records, 16)


def test_frames_of_another_size_are_scaled_to_the_shards(tmp_path: Path) -> None:
    wide = encode_picture(np.full((30, 50, 3), 200, np.uint8))
    write_frame_shards(tmp_path / "s", [FramesRecord("a", 1.0, [wide], NO_CAPTIONS)], 16)
    assert FrameShards(tmp_path / "s").frames(0, np.array([0])).shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match="0 frames at 1"):
        write_frame_shards(tmp_path / "t", [FramesRecord("a", 1.0, [], NO_CAPTIONS)], 16)


def enormous_png() -> bytes:
    """A header that claims 60,000 x 60,000 pixels, and nothing behind it."""
    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + len(header).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


def test_truncated_foreign_and_enormous_pictures_are_refused() -> None:
    whole = encode_picture(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    for data in (whole[: len(whole) // 2], b"", b"text", gif.getvalue()):
        with pytest.raises(InputError, match="here: not a whole"):
            decode_picture(data, "here")
    with pytest.raises(InputError, match="here: "):
        decode_picture(enormous_png(), "here")
    assert decode_picture(whole, "here").shape == (64, 64, 3)


# --- What is said and asked -------------------------------------------------------------------------------------------


def test_entities_are_read_with_and_without_counts(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("man 900\nfire truck 20\ndog\n")
    assert read_entities(tmp_path / "e.txt") == ("man", "fire truck", "dog")
    assert read_entities(tmp_path / "e.txt", 1) == ("man",)
    (tmp_path / "e.txt").write_text("man\ndog\nMan\n")
    with pytest.raises(InputError, match="'Man' stands twice, as entity 1 and 3"):
        read_entities(tmp_path / "e.txt")
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_entities(tmp_path / "e.txt")
    assert frequent_nouns(["a dog and a cat", "the dog"], {"dog", "cat", "owl"}) == ("dog", "cat")


def test_pretraining_captions_are_read_from_tables_and_never_from_pickles(tmp_path: Path) -> None:
    rows = [{"video_id": "1", "text": "a dog", "txt_len": 3}, {"video_id": "2", "text": "long", "txt_len": 30}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("video_id,text,txt_len\n1,a dog,3\n2,long,30\n")
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        pairs = read_captioned(tmp_path / name)
        assert [(p.path, p.caption, p.kind) for p in pairs] == [("1.mp4", "a dog", "video")]
    (tmp_path / "cc3m.json").write_text(json.dumps([{"image": "x.jpg", "caption": ["a cat", "b"]}]))
    assert read_captioned(tmp_path / "cc3m.json")[0].kind == "image"
    (tmp_path / "train.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="to_csv"):
        read_captioned(tmp_path / "train.pkl")
    (tmp_path / "b.csv").write_text("name\nx\n")
    with pytest.raises(InputError, match="lacks the columns video_id, text"):
        read_captioned(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match="not a parquet file"):
        read_captioned(tmp_path / "c.parquet")


def test_questions_are_answered_with_exactly_the_same_words_by_kind(tmp_path: Path) -> None:
    rows = [
        {"question": "what is cut?", "answer": "onion", "video_id": 7, "answer_type": "what"},
        {"question": "who cuts?", "answer": "man", "video_id": "vid_2"},
        {"question": "what else?", "answer": "onion", "video_id": "vid_3"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(tmp_path / "q.jsonl")
    assert [q.kind for q in questions] == ["what", "who", "what"] and questions[0].video_id == "video7"
    assert frequent_answers(questions, 1) == {"onion": 0}
    metrics = answer_metrics(questions, ["onion", "a man", "knife"])
    assert metrics == {"questions": 3, "accuracy": 33.33, "accuracy_what": 50, "accuracy_who": 0, "majority": 66.67}
    (tmp_path / "a.json").write_text('{"onion": 0, "man": 0}')
    with pytest.raises(InputError, match="each once"):
        read_answers(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"onion": 1, "man": 0}')
    assert read_answers(tmp_path / "a.json")["man"] == 0
    (tmp_path / "q.jsonl").write_text('{"question": "what?", "answer": ""}\n')
    with pytest.raises(InputError, match="needs a question"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match="1 answers to 2"):
        answer_metrics([OpenQuestion("a", "b", "c", "what")] * 2, ["c"])


class Product:
    """Judges a pair by the product of the first rows of text and video."""

    judged = 0

    def matching_logits(self, words: Packed, clips: Packed) -> torch.Tensor:
        self.judged += len(words)
        product = first_rows(words) * first_rows(clips)
        return torch.cat([torch.zeros_like(product), product], 1)


def test_the_best_by_contrast_are_judged_and_the_others_come_behind() -> None:
    model = Product()
    words = Packed.of([torch.full((2, 1), 1.0), torch.full((3, 1), -1.0)])
    video = torch.tensor([3.0, 1.0, 2.0, 0.5])[:, None, None].expand(-1, 5, 1)
    everything = matching_matrix(model, words, video, pairs_at_once=3)
    np.testing.assert_allclose(everything, [[3, 1, 2, 0.5], [-3, -1, -2, -0.5]])
    assert model.judged == 8
    similarity = torch.tensor([[0.1, 0.9, 0.8, 0.0], [0.0, 0.1, 0.2, 0.3]])
    reranked = matching_matrix(model, words, video, similarity, best=2)
    assert model.judged == 12
    assert np.argsort(-reranked, 1).tolist() == [[2, 1, 0, 3], [3, 2, 1, 0]]
    with pytest.raises(InputError, match="need similarities"):
        matching_matrix(model, words, video, best=2)
    assert ranks_of_columns(everything).tolist() == [1, 2]
    logits = np.stack([np.zeros(2), np.array([0.0, 2.0])], -1)
    assert release_scores(logits).tolist() == [0.5, 0.8808]
