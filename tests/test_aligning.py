"""Alignment learned from narration whose times are off: stretches, windows, the recipe after TAN, captions moved."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from pipelines.align import AlignConfig, align
from pipelines.evaluate_moments import MomentConfig, evaluate_moments
from videoclip.alignment import Limit, Moves, best_shifts
from videoclip.data.captions import NO_CAPTIONS, Captions
from videoclip.data.clips import ClipConfig
from videoclip.data.htm_align import AlignedVideo
from videoclip.data.shards import Manifest, Shards, ShardWriter, VideoRecord
from videoclip.data.stretches import StretchBatch, StretchSampler
from videoclip.data.words import WordTokenizer, train_wordpiece
from videoclip.embedding import embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.alignment import align_videos
from videoclip.evaluation.sentences import sentence_curves
from videoclip.files import read_json_lines, write_json_lines
from videoclip.losses import multiple_instance_losses
from videoclip.packed import Packed
from videoclip.parts.windows import agreed_windows, best_windows, inside, own_curves, windows_said
from videoclip.recipes import alignment, from_pretrained, videoclip
from videoclip.recipes.videoclip import Options
from videoclip.training import EpochBatches, OptimizerConfig, make_optimizer, step

CLIPS = ClipConfig(max_words=8, min_words=2)


def tokenizer_of(shards: Shards) -> WordTokenizer:
    return train_wordpiece([text for part in shards.parts for text in part.caption_text.to_pylist()], 200)


def small(shards: Shards, **options: object) -> alignment.Recipe:
    chosen = {
        "width": 32,
        "layers": 1,
        "heads": 2,
        "max_seconds": 24,
        "max_words": 8,
        "joint_layers": 1,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    own = alignment.Options(**{**chosen, **options})  # type: ignore[arg-type]
    return alignment.build(own, shards.manifest, tokenizer_of(shards))


# --- Stretches --------------------------------------------------------------------------------------------------------


def test_a_stretch_holds_every_sentence_that_is_said_in_it(make_shards: Callable[..., Shards], tmp_path: Path) -> None:
    shards = make_shards(6)
    sampler = StretchSampler(shards, tokenizer_of(shards), CLIPS, tmp_path, 16, 8)
    rows = np.array([4, 0, 5])
    for seed in range(20):
        batch = sampler.batch(rows, np.random.default_rng(seed))
        assert len(batch) == 3 and batch.video.tolist() == [4, 0, 5]
        assert batch.video_tokens.lengths.tolist() == [16] * 3 and min(batch.sentences) >= 1
        assert len(batch.word_ids) == sum(batch.sentences) == len(batch.said)
        middle = batch.said.mean(1)
        assert ((middle >= 0) & (middle < 16)).all()
        of_stretch = torch.split(batch.said, list(batch.sentences))
        for row, said, tokens in zip(rows, of_stretch, batch.video_tokens.split()):
            record = shards.record(int(row))
            a = next(a for a in range(25) if np.array_equal(record.tokens[a : a + 16], tokens.numpy()))
            centre = (record.captions.start + record.captions.end) / 2
            assert len(said) == ((centre >= a) & (centre < a + 16)).sum()
    again = sampler.batch(rows, np.random.default_rng(3), slice(1, 2))
    whole = sampler.batch(rows, np.random.default_rng(3))
    assert torch.equal(again.video_tokens.rows, whole.video_tokens.rows[16:32]), "a share is what all have there"


def test_videos_without_words_are_never_drawn(make_shards: Callable[..., Shards], tmp_path: Path) -> None:
    shards = make_shards(3, captions=0)
    tokenizer = train_wordpiece(["a word"], 50)
    assert not len(StretchSampler(shards, tokenizer, CLIPS, tmp_path, 16, 8).usable_rows())


# --- Windows ----------------------------------------------------------------------------------------------------------


def test_windows_are_the_seconds_that_a_sentence_touches() -> None:
    said = torch.tensor([[0.2, 0.9], [3.5, 5.1], [-2.0, 1.0], [9.0, 30.0]])
    assert windows_said(said, torch.full((4,), 10)).tolist() == [[0, 1], [3, 6], [0, 1], [9, 10]]


def test_positives_lie_in_a_sentences_own_stretch() -> None:
    video, owners = Packed(torch.zeros(7, 1), torch.tensor([3, 4])), torch.tensor([0, 1, 1])
    positive = inside(torch.tensor([[1, 3], [0, 1], [2, 4]]), video, owners)
    assert positive.T.int().tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    similarity = torch.arange(21.0).view(7, 3)
    curves = own_curves(similarity, video, owners)
    assert curves[0, :3].tolist() == [0, 3, 6] and curves[0, 3] == float("-inf")
    assert curves[2].tolist() == [11, 14, 17, 20]


def test_the_best_window_has_most_of_the_softmax_and_stays_in_the_stretch() -> None:
    curves = torch.tensor([[0.0, 5, 5, 0, 0], [0, 0, 9, float("-inf"), float("-inf")]])
    assert best_windows(curves, torch.tensor([2, 2])).tolist() == [[1, 3], [1, 3]]


def test_two_places_that_agree_replace_the_time_that_was_said() -> None:
    said = torch.tensor([[0, 4], [0, 4], [0, 4]])
    one, other = torch.tensor([[10, 14], [10, 14], [10, 14]]), torch.tensor([[11, 15], [13, 17], [10, 14]])
    windows, agreed = agreed_windows(said, one, other, 0.5)
    assert windows.tolist() == [[10, 15], [0, 4], [10, 14]] and agreed.tolist() == [True, False, True]


def test_multiple_instance_losses_by_hand() -> None:
    video, text = torch.eye(3), torch.eye(3)[:2]
    positive = torch.tensor([[True, False], [False, True], [False, True]])
    of_text, of_video = multiple_instance_losses(video, text, positive)
    e = np.e
    assert of_text.numpy() == pytest.approx([np.log((e + 2) / e), np.log((e + 2) / (e + 1))])
    assert of_video.numpy() == pytest.approx([np.log((e + 1) / e), np.log((e + 1) / e), np.log(2)])
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    assert [len(x) for x in multiple_instance_losses(video, text, nothing)] == [0, 0]


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_sentences_are_read_in_no_order_and_stay_with_their_stretch(make_shards: Callable[..., Shards]) -> None:
    model = small(make_shards(4)).eval()
    video = Packed(torch.randn(10, 16), torch.tensor([4, 6]))
    text, order = torch.nn.functional.normalize(torch.randn(5, 32), dim=1), torch.tensor([1, 0, 4, 2, 3])
    counts = torch.tensor([2, 3])
    (shown, said), alignable = model.read_together(video, text, counts)
    (again, swapped), _ = model.read_together(video, text[order], counts)
    torch.testing.assert_close(said[order], swapped)
    torch.testing.assert_close(shown, again)
    (alone, _), _ = model.read_together(Packed.of([video.rows[4:]]), text[2:], counts[1:])
    torch.testing.assert_close(shown[4:], alone)
    assert alignable.shape == (5,) and shown.detach().norm(dim=1).numpy() == pytest.approx(np.ones(10), abs=1e-5)


def planted(tmp_path: Path, late: float = 0.0) -> tuple[Shards, list[np.ndarray]]:
    """Videos of five shots of eight seconds: each is named once, `late` seconds off; one line is of nothing."""
    generator = np.random.default_rng(0)
    names = ["alpha", "beta", "gamma", "delta", "kappa", "lambda", "sigma", "omega"]
    codes = 2 * generator.standard_normal((len(names), 16))
    writer = ShardWriter(tmp_path / "planted", Manifest("planted", "a" * 64, 16), 50)
    shots = []
    for number in range(48):
        shown = generator.permutation(len(names))[:5]
        tokens = np.repeat(codes[shown], 8, 0) + 0.3 * generator.standard_normal((40, 16))
        start = np.clip(8.0 * np.arange(5) + 2 + late * generator.choice([-1, 1], 5), 0, 37)
        order = np.argsort(np.append(start, 20.5), kind="stable")
        text = np.array([*(f"now the {names[shot]}" for shot in shown), "please subscribe"])[order]
        start = np.append(start, 20.5)[order]
        captions = Captions(start.astype(np.float32), (start + 3).astype(np.float32), text.tolist())
        writer.add(VideoRecord(f"v{number}", 40.0, tokens.astype(np.float16), captions))
        shots.append(np.append(np.arange(5), -1)[order])
    writer.close()
    return Shards(tmp_path / "planted"), shots


def trained_on(shards: Shards, cache: Path, steps: int, **options: object) -> alignment.Recipe:
    model = small(shards, max_seconds=40, **options)
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=3e-3))
    sampler = StretchSampler(shards, model.tokenizer(), CLIPS, cache, 40, 8)
    generator = np.random.default_rng(0)
    batches = [[generator.permutation(48)[:16]] for _ in range(steps)]
    for number, batch in enumerate(EpochBatches(sampler, batches, 0, 0)):
        figures = step(model, optimizer, batch, 3e-3 * min(1, (number + 1) / 10), 2.0)
    assert np.isfinite(figures["loss"])
    return model.eval()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, list[np.ndarray], Path]:
    """Planted shards, what their captions show, and the folder of a model that learned to align them."""
    folder = tmp_path_factory.mktemp("aligning")
    shards, shots = planted(folder, late=4.0)
    model = trained_on(shards, folder, 60, agree_after=30)
    model.save_pretrained(folder / "model")
    return shards, shots, folder / "model"


def test_it_learns_where_sentences_belong_from_times_that_are_off(
    taught: tuple[Shards, list[np.ndarray], Path],
) -> None:
    shards, shots, folder = taught
    model = from_pretrained(folder)
    right, before = [], []
    for row, shot in enumerate(shots[:16]):
        record = shards.record(row)
        texts = embed_texts(model, record.captions.text)
        curves = sentence_curves(model, record.tokens, texts, record.captions.start, None)
        shift = best_shifts(curves, record.captions, float(model.temperature), Moves())
        for s in np.flatnonzero(shot >= 0):
            centre = record.captions.start[s] + 1.5
            before.append(8 * shot[s] <= centre < 8 * shot[s] + 8)
            right.append(8 * shot[s] <= centre + shift[s] < 8 * shot[s] + 8)
    assert np.mean(right) > np.mean(before) + 0.2, (np.mean(before), np.mean(right))


def stretches() -> StretchBatch:
    """Three stretches with four sentences."""
    torch.manual_seed(1)
    lengths, sentences = torch.tensor([6, 4, 5]), (1, 2, 1)
    words = Packed.of([torch.tensor([2, 7 + i, 8, 3]) for i in range(4)])
    said = torch.tensor([[1.0, 3], [0, 1.5], [2, 4], [1, 2]])
    return StretchBatch(Packed(torch.randn(15, 8), lengths), words, sentences, said, torch.arange(3))


def updated(rank: int | None) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Figures and weights after updates on all stretches, or on the share of one of two workers."""
    torch.manual_seed(0)
    shape = {"video_dimension": 8, "width": 16, "layers": 1, "heads": 2, "intermediate": 32, "vocabulary": 30}
    config = alignment.AlignmentConfig(**shape, cls_id=2, sep_id=3, dropout=0.0, joint_layers=1, agree_after=1)  # type: ignore[arg-type]
    recipe = alignment.Recipe(config).train()
    module = recipe if rank is None else DistributedDataParallel(recipe)
    batch = stretches()
    chosen, of_text = {None: ([0, 1, 2], [0, 1, 2, 3]), 0: ([0, 1], [0, 1, 2]), 1: ([2], [3])}[rank]
    share = StretchBatch(
        batch.video_tokens.take(torch.tensor(chosen)),
        batch.word_ids.take(torch.tensor(of_text)),
        tuple(batch.sentences[i] for i in chosen),
        batch.said[of_text],
        batch.video[chosen],
        rows_per_rank=(3,) if rank is None else (2, 1),
    )
    optimizer = torch.optim.SGD(recipe.parameters(), 0.05, momentum=0.9)
    return [step(module, optimizer, share, 0.05, 1.0) for _ in range(3)], recipe.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(updated(rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_with_unequal_shares_update_as_one_does(tmp_path: Path) -> None:
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    figures, weights = updated(None)
    for rank in range(2):
        of_worker, its_weights = torch.load(tmp_path / f"{rank}.pt")
        for alone, together in zip(figures, of_worker):
            assert together == pytest.approx(alone, abs=1e-5, rel=1e-5), "metrics are those of all workers"
        for name, value in weights.items():
            torch.testing.assert_close(its_weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


# --- Captions moved and dropped ---------------------------------------------------------------------------------------


def test_a_caption_moves_no_further_than_it_may_and_not_without_gain() -> None:
    curves = np.zeros((4, 30), np.float32)
    curves[0, 10:14] = 1  # 4 seconds from where it is said
    curves[1, 25:] = 1  # out of reach
    curves[3, 0:3] = 1  # so early that it would begin before the video
    captions = Captions(np.array([6.0, 6, 12, 1.5]), np.array([10.0, 10, 15, 5.5]), ["a"] * 4)
    shift = best_shifts(curves, captions, 0.1, Moves(reach=6))
    assert shift.tolist() == [4, 0, 0, -1.5]
    assert not best_shifts(curves, captions, 0.1, Moves(reach=0)).any()
    assert not best_shifts(curves, captions, 0.1, Moves(cost=0.5))[:3].any(), "a move costs"


def test_the_limit_for_dropping_is_found_without_labels() -> None:
    generator = np.random.default_rng(0)
    off_topic = generator.random(20_000) < 0.3
    standing = np.where(off_topic, generator.normal(0, 1, 20_000), generator.normal(4, 1, 20_000))
    limit = Limit.fit(standing, 0.9)
    dropped = standing < limit.standing
    assert limit.off_topic == pytest.approx(0.3, abs=0.02) and limit.dropped == pytest.approx(dropped.mean(), abs=1e-3)
    assert off_topic[dropped].mean() == pytest.approx(0.9, abs=0.02) and dropped[off_topic].mean() > 0.9
    assert Limit.fit(standing, 0.99).standing < limit.standing
    assert Limit.fit(generator.normal(0, 1, 2000), 0.9).dropped == 0, "of one kind, nothing is dropped"
    assert Limit.fit(np.zeros(5), 0.9).dropped == 0
    with pytest.raises(InputError, match="precision"):
        Limit.fit(standing, 0.0)
    with pytest.raises(InputError, match="needs at least two"):
        Limit.fit(standing[:1], 0.9)


def test_align_writes_shards_with_captions_where_they_are_shown(
    taught: tuple[Shards, list[np.ndarray], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, shots, model = taught
    config = AlignConfig(shards.folder, model, tmp_path / "new", precision=0.8)
    figures = align(config)
    new = Shards(tmp_path / "new", verify=True)
    assert figures["moved"] + figures["in place"] + figures["dropped"] == figures["captions"] == 48 * 6
    assert figures["moved"] > 0 and figures["dropped"] > 0
    assert os.path.samefile(shards.folder / "part-00000.arrow", tmp_path / "new" / "part-00000.arrow")
    assert sum(len(record.captions) for record in new) == figures["captions"] - figures["dropped"]
    kept_off, shown, before = 0, [], []
    for record, old, shot in zip(new, shards, shots):
        assert (np.diff(record.captions.start) >= 0).all()
        places = {text: s for text, s in zip(old.captions.text, shot) if s >= 0}
        kept_off += "please subscribe" in record.captions.text
        for captions, into in ((old.captions, before), (record.captions, shown)):
            for start, text in zip(captions.start, captions.text):
                if text in places:
                    into.append(8 * places[text] <= start + 1.5 < 8 * places[text] + 8)
    assert np.mean(shown) > np.mean(before) + 0.2 and len(shown) > 0.9 * len(before)
    assert kept_off < 24, "most lines of nothing are dropped"
    assert align(config) == figures and "nothing to do" in capsys.readouterr().out
    assert not list((tmp_path / "new").glob("aligned-*"))
    with pytest.raises(InputError, match="other precision"):
        align(replace(config, precision=0.7))


def test_an_interrupted_alignment_leaves_no_shards_and_goes_on(
    taught: tuple[Shards, list[np.ndarray], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, _, model = taught
    config = AlignConfig(shards.folder, model, tmp_path / "new", keep_all=True)
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.align._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            align(config)
    with pytest.raises(InputError, match="holds no manifest"):
        Shards(tmp_path / "new")
    monkeypatch.setattr("videoclip.alignment.Aligner.align", lambda *_: pytest.fail("what was done is done again"))
    assert align(config)["dropped"] == 0
    assert len(Shards(tmp_path / "new", verify=True)) == len(shards)


def test_what_cannot_be_aligned_is_refused(
    taught: tuple[Shards, list[np.ndarray], Path], make_shards: Callable[..., Shards], tmp_path: Path
) -> None:
    shards, _, model = taught
    with pytest.raises(InputError, match="tokens of the encoder random"):
        align(AlignConfig(make_shards(4).folder, model, tmp_path / "other-encoder"))
    silent = ShardWriter(tmp_path / "silent", replace(shards.manifest, parts=[], complete=False))
    for row in range(4):
        silent.add(replace(shards.record(row), captions=NO_CAPTIONS))
    silent.close()
    with pytest.raises(InputError, match="holds no captions to align"):
        align(AlignConfig(tmp_path / "silent", model, tmp_path / "new"))
    with pytest.raises(InputError, match="holds other shards already"):
        align(AlignConfig(shards.folder, model, tmp_path / "silent"))
    with pytest.raises(InputError, match="these are the shards that are read"):
        align(AlignConfig(shards.folder, model, shards.folder))
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="reach cannot be negative"):
        Moves(reach=-1)


# --- Queries that nothing answers -------------------------------------------------------------------------------------


def test_a_query_that_a_video_does_not_show_is_told_from_one_that_it_shows(
    taught: tuple[Shards, list[np.ndarray], Path], tmp_path: Path
) -> None:
    shards, shots, model = taught
    rows = []
    for record, shot in zip(shards, shots):
        for text, s in zip(record.captions.text, shot):
            if s >= 0:
                windows = {"relevant_windows": [[8 * int(s), 8 * int(s) + 8]], "relevant_clip_ids": [4 * int(s)]}
                query = {"qid": len(rows), "query": text, "duration": 40, "vid": record.video_id}
                rows.append({**query, **windows, "saliency_scores": [[4, 4, 4]]})
    write_json_lines(tmp_path / "train.jsonl", rows[120:])
    write_json_lines(tmp_path / "val.jsonl", rows[:120])
    config = MomentConfig(
        tmp_path / "val.jsonl",
        model,
        shards.folder,
        train_annotations=tmp_path / "train.jsonl",
        train_shards=shards.folder,
        output=tmp_path / "out" / "metrics.json",
    )
    absence = evaluate_moments(config)["absence"]
    assert absence["AUC"] > 90 and absence["precision"] > 80 and absence["recall"] > 70, absence
    answers = read_json_lines(tmp_path / "out" / "predictions.jsonl")
    assert len(answers) == 120 and all(0 <= answer["present"] <= 1 for answer in answers)
    assert np.mean([answer["present"] for answer in answers]) > 0.7, "here every video shows its queries"
    with pytest.raises(InputError, match="give --train-annotations"):
        evaluate_moments(replace(config, train_annotations=None))
    two = [row for row in rows[:20] if row["query"] == rows[0]["query"]]
    write_json_lines(tmp_path / "same.jsonl", two)
    with pytest.raises(InputError, match="nothing to ask it of"):
        evaluate_moments(replace(config, annotations=tmp_path / "same.jsonl"))


def test_sentences_are_read_together_only_by_a_model_that_can(make_shards: Callable[..., Shards]) -> None:
    shards = make_shards(3)
    options = Options(width=16, layers=1, heads=2, max_seconds=16, max_words=8)
    model = videoclip.build(options, shards.manifest, tokenizer_of(shards)).eval()
    texts, tokens = embed_texts(model, ["stir the egg"]), shards.tokens(0)
    assert sentence_curves(model, tokens, texts, np.zeros(1)).shape == (1, 40)
    with pytest.raises(InputError, match="towers alone"):
        sentence_curves(model, tokens, texts, np.zeros(1), by="both")
    both = small(shards).eval()
    texts, expected = embed_texts(both, ["stir the egg", "chop"]), np.array([2.0, 38.0])
    towers, together, mean = (
        sentence_curves(both, tokens, texts, expected, 10.0, by=by) for by in ("towers", "together", "both")
    )
    assert np.isfinite(towers).sum(1).tolist() == [12, 12], "seconds that are near"
    near = np.isfinite(mean)
    np.testing.assert_allclose(mean[near], (towers[near] + together[near]) / 2, atol=1e-5)
    times = np.array([1.0, 9]), np.array([4.0, 12])
    video = AlignedVideo(shards.video_ids()[0], np.array([True, False]), *times, ["stir", "chop"])
    unknown = replace(video, video_id="elsewhere")
    metrics, _ = align_videos(both, shards, [video, unknown], by="both")
    assert metrics["sentences"] == 2 and metrics["recall"] in (0, 100) and metrics["dropped"] == 1
