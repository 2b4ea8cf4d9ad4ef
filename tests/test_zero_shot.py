"""The other benchmarks of the paper: official files in, the benchmark's own numbers out."""

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KITCHEN
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cli import main
from pipelines.evaluate_actions import (
    COINConfig,
    CrossTaskConfig,
    QuestionConfig,
    evaluate_coin,
    evaluate_crosstask,
    evaluate_questions,
)
from pipelines.evaluate_retrieval import DiDeMoConfig, MSRVTTConfig, evaluate_didemo, evaluate_msrvtt
from pipelines.report import ReportConfig, report
from videoclip.data.annotated_clips import AnnotatedClip
from videoclip.data.coin import read_coin
from videoclip.data.crosstask import read_crosstask
from videoclip.data.didemo import read_didemo
from videoclip.data.msrvtt import Question, read_msrvtt, read_questions
from videoclip.data.shards import Shards
from videoclip.data.words import train_wordpiece
from videoclip.embedding import embed_texts
from videoclip.errors import InputError
from videoclip.evaluation.actions import (
    frame_accuracy,
    log_softmax,
    outside_level,
    place_steps,
    segment_actions,
    step_recall,
)
from videoclip.evaluation.questions import answer_questions
from videoclip.evaluation.retrieval import retrieve_clips
from videoclip.files import read_json_lines
from videoclip.model import VideoCLIP, VideoCLIPConfig
from videoclip.packed import Packed
from videoclip.synthetic.kitchen import KitchenVideo, Step, caption, plan_kitchen
from videoclip.synthetic.kitchen.vocabulary import ACTIONS, INGREDIENTS

# --- Annotation files ---------------------------------------------------------------------------------------------


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_msrvtt_is_read_from_the_1ka_csv_and_from_the_full_json(tmp_path: Path) -> None:
    table = "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person is connecting something\n"
    (clip,) = read_msrvtt(write(tmp_path / "MSRVTT_JSFUSION_test.csv", table))
    assert (clip.video_id, clip.start, clip.end) == ("video9770", 0, None)
    assert clip.sentences == ("a person is connecting something",)
    full = {
        "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "test"}],
        "sentences": [{"video_id": f"video{n % 2}", "caption": f"caption {n}"} for n in range(5)],
    }
    (clip,) = read_msrvtt(write(tmp_path / "MSRVTT_data.json", full))
    assert clip.video_id == "video1" and clip.sentences == ("caption 1", "caption 3")
    for broken, message in (
        ({**full, "videos": []}, "no videos of the split"),
        ({**full, "sentences": []}, "video 'video1': the sentence is missing"),
        ([], "MSR-VTT layout"),
    ):
        with pytest.raises(InputError, match=message):
            read_msrvtt(write(tmp_path / "broken.json", broken))
    with pytest.raises(InputError, match="lacks the columns sentence"):
        read_msrvtt(write(tmp_path / "broken.csv", "video_id\nvideo1\n"))


def test_didemo_descriptions_are_joined_by_video_or_kept_apart(tmp_path: Path) -> None:
    rows = [{"video": f"{n % 2}@N00_17.mov", "description": f"thing {n}", "times": [[0, 0]]} for n in range(4)]
    path = write(tmp_path / "test_data.json", rows)
    joined, apart = read_didemo(path), read_didemo(path, "sentence")
    assert [clip.sentences for clip in joined] == [("thing 0 thing 2",), ("thing 1 thing 3",)]
    assert [clip.sentences for clip in apart] == [("thing 0", "thing 2"), ("thing 1", "thing 3")]
    assert joined[0].video_id == "0@N00_17"
    with pytest.raises(InputError, match="description 1: the sentence is empty"):
        read_didemo(write(path, [rows[0], {"video": "x.mov", "description": " "}]))


def test_questions_are_read_with_the_place_of_the_right_answer(tmp_path: Path) -> None:
    head = "\t".join(["vid_key", "a1", "a2", "a3", "a4", "a5", "answer"])
    (question,) = read_questions(write(tmp_path / "qa.csv", f"{head}\nmsr7010\ta\tb\tc\td\te\t3\n"))
    assert (question.video_id, question.choices, question.answer) == ("video7010", ("a", "b", "c", "d", "e"), 3)
    with pytest.raises(InputError, match="row 2: the answer '5'"):
        read_questions(write(tmp_path / "qa.csv", f"{head}\nmsr7010\ta\tb\tc\td\te\t5\n"))
    with pytest.raises(InputError, match="row 2: a choice is empty"):
        read_questions(write(tmp_path / "qa.csv", f"{head}\nmsr7010\ta\tb\t\td\te\t0\n"))


def test_coin_segments_become_labels_of_seconds(tmp_path: Path) -> None:
    annotation = [
        {"id": "7", "segment": [1.2, 3.0], "label": "cut the onion"},
        {"id": "9", "segment": [2.5, 4.4], "label": "fry"},
    ]
    database = {
        "a": {"subset": "testing", "annotation": annotation},
        "b": {"subset": "training", "annotation": []},
    }
    path = write(tmp_path / "COIN.json", {"database": database})
    (video,), names = read_coin(path)
    assert names == {7: "cut the onion", 9: "fry"}
    assert video.per_second(6).tolist() == [0, 7, 9, 9, 9, 0]  # a later segment wins where two meet
    assert video.per_second(3).tolist() == [0, 7, 9], "annotations may outlast the tokens"
    for broken in ([{"id": "7", "segment": [3, 3], "label": "x"}], [{"id": "7", "segment": [1, 2]}], [7]):
        database["a"]["annotation"] = broken
        with pytest.raises(InputError, match="video 'a'"):
            read_coin(write(path, {"database": database}))
    with pytest.raises(InputError, match="subset 'validation'"):
        read_coin(write(path, {"database": {}}), "validation")


def crosstask_release(folder: Path, steps: str, annotations: dict[str, str]) -> Path:
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    write(folder / "tasks_primary.txt", steps)
    for name, text in annotations.items():
        write(folder / "annotations" / f"{name}.csv", text)
    return folder


def test_crosstask_is_read_as_released(tmp_path: Path) -> None:
    steps = "105222\nMake Lemonade\nhttp://x\n3\npour water,add sugar,stir\n\n"
    folder = crosstask_release(tmp_path, steps, {"105222_abc_d": "1,1.5,3.2\n3,5,6\n", "999_x": "1,0,1\n"})
    tasks, (video,) = read_crosstask(folder)
    assert tasks == {"105222": ["pour water", "add sugar", "stir"]} and video.video_id == "abc_d"
    happens = video.assignment(6, 3)
    assert happens[:, 0].nonzero()[0].tolist() == [1, 2, 3] and happens[:, 2].nonzero()[0].tolist() == [5]
    listed = write(tmp_path / "videos_val.csv", "105222,other,http://x\n")
    with pytest.raises(InputError, match="these tasks and videos"):
        read_crosstask(folder, listed)
    for text, message in (("4,1,2\n", "_d.csv:1: step 4 of 3"), ("1,2\n", "_d.csv:1: expected step,start,end")):
        with pytest.raises(InputError, match=message):
            read_crosstask(crosstask_release(tmp_path, steps, {"105222_abc_d": text}))
    with pytest.raises(InputError, match="as many steps"):
        read_crosstask(crosstask_release(tmp_path, steps.replace("3\n", "4\n"), {}))


# --- Figures ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_steps_are_placed_in_order_at_the_best_sum(steps: int, more: int, seed: int) -> None:
    scores = np.random.default_rng(seed).standard_normal((steps + more, steps))
    places = place_steps(scores)
    assert (np.diff(places) > 0).all()
    best = max(
        sum(scores[t, k] for k, t in enumerate(times)) for times in itertools.combinations(range(steps + more), steps)
    )
    assert scores[places, np.arange(steps)].sum() == pytest.approx(best)


def test_more_steps_than_seconds_are_refused() -> None:
    with pytest.raises(InputError, match="3 steps cannot happen"):
        place_steps(np.zeros((2, 3)))


def test_segments_and_figures_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.3], [0.1, 0.8]])
    labels = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert segment_actions(scores, None).tolist() == [1, 2, 2]
    assert segment_actions(scores, outside_level(scores, labels, "labels")).tolist() == [1, 0, 2]  # 0.3 < 0.5
    mean, deviation = np.mean([0.9, 0.3, 0.8]), np.std([0.9, 0.3, 0.8])
    assert outside_level(scores, labels, "threshold") == pytest.approx(mean + 0.5 * deviation)
    assert outside_level(scores, labels, "never") is None
    assert frame_accuracy([np.array([0, 1]), np.array([2])], [np.array([0, 2]), np.array([2])]) == pytest.approx(
        200 / 3
    )
    assert step_recall({"a": 1, "b": 0}, {"a": 2, "b": 1, "c": 0}) == (25.0, {"a": 50.0, "b": 0.0})
    np.testing.assert_allclose(np.exp(log_softmax(scores)).sum(1), 1)


@pytest.fixture
def model_and_shards(make_shards: Callable[..., Shards]) -> tuple[VideoCLIP, Shards]:
    """Random weights, which tell what is computed as well as trained ones do."""
    shards = make_shards(count=4)
    tokenizer = train_wordpiece(text for record in shards for text in record.captions.text)
    torch.manual_seed(0)
    size = {"width": 16, "layers": 1, "heads": 2, "intermediate": 32, "vocabulary": tokenizer.vocabulary}
    special = {"cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id}
    model = VideoCLIP(VideoCLIPConfig(video_dimension=16, **size, **special)).eval()
    model.frozen.tokenizer = tokenizer
    return model, shards


def scores_by_hand(model: VideoCLIP, tokens: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Similarity of one clip with each text, one after the other."""
    clip = torch.from_numpy(np.array(tokens[: model.config.max_seconds]))
    with torch.no_grad():
        video = model.embed_video(Packed(clip, torch.tensor([len(clip)])))[0]
    return np.array([float(model.encode_text([text])[0] @ video) for text in texts])


def test_a_question_is_answered_by_the_choice_that_is_nearest_to_its_video(
    model_and_shards: tuple[VideoCLIP, Shards],
) -> None:
    model, shards = model_and_shards
    egg, pan = ([f"{verb} the {noun}" for verb in ("chop", "stir", "pour", "until", "now")] for noun in ("egg", "pan"))
    nearest = [
        int(scores_by_hand(model, shards.tokens(r), said).argmax()) for r, said in ((3, egg), (1, pan), (0, egg))
    ]
    right = [nearest[0], (nearest[1] + 1) % 5, nearest[2]]
    asked = [("video_003", egg), ("video_001", pan), ("video_000", egg), ("gone", egg)]
    questions = [Question(video, tuple(said), answer) for (video, said), answer in zip(asked, [*right, 0])]
    metrics, rows = answer_questions(model, shards, questions)
    assert [row["answer"] for row in rows] == nearest and [row["right"] for row in rows] == right
    assert metrics == {"questions": 3, "accuracy": 66.67, "chance": 20.0, "dropped": 1}


def test_annotated_clips_are_cut_out_of_their_videos_ranked_and_counted(
    model_and_shards: tuple[VideoCLIP, Shards],
) -> None:
    model, shards = model_and_shards
    first = AnnotatedClip("video_002", 2.0, 9.0, ("chop the egg", "stir the pan"))
    last = AnnotatedClip("video_000", 5.0, None, ("now pour",))
    lost = [AnnotatedClip("gone", 0.0, 4.0, ("x",)), AnnotatedClip("video_001", 99.0, 104.0, ("behind its end",))]
    metrics, rows = retrieve_clips(model, shards, [lost[0], first, lost[1], last])
    said = [*first.sentences, *last.sentences]
    scores = [scores_by_hand(model, tokens, said) for tokens in (shards.tokens(2)[2:9], shards.tokens(0)[5:])]
    ranks = [1 + int(scores[1 - own][text] > scores[own][text]) for text, own in enumerate((0, 0, 1))]
    assert [row["rank"] for row in rows] == ranks and [row["sentence"] for row in rows] == said
    assert [row["found"][rank - 1]["video_id"] for row, rank in zip(rows, ranks)] == ["video_002"] * 2 + ["video_000"]
    assert (metrics["queries"], metrics["clips"], metrics["dropped"]) == (3, 2, 2)
    assert metrics["R@1"] == round(100 * np.mean([rank == 1 for rank in ranks]), 2) and metrics["chance_R@1"] == 50
    assert rows[2]["end"] == 40.0, "a clip without an end goes to that of its video"


# --- The stages on the tiny corpus --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos() -> list[KitchenVideo]:
    return [video for video in plan_kitchen(KITCHEN) if video.split == "test"]


def label(step: Step) -> str:
    return f"{ACTIONS[step.action].written} the {INGREDIENTS[step.ingredient][0].written}"


@pytest.mark.slow
def test_whole_videos_are_retrieved_both_ways(
    trained: Path, tokens: Path, videos: list[KitchenVideo], tmp_path: Path
) -> None:
    sentences = [{"video_id": v.video_id, "caption": caption(step)} for v in videos for step in v.steps]
    listed = [{"video_id": v.video_id, "split": "test"} for v in videos] + [{"video_id": "gone", "split": "test"}]
    full = {"videos": listed, "sentences": [*sentences, {"video_id": "gone", "caption": "nobody has it"}]}
    annotations = write(tmp_path / "MSRVTT_data.json", full)
    config = MSRVTTConfig(trained / "model", tokens / "test", annotations, tmp_path / "m" / "metrics.json")
    metrics = evaluate_msrvtt(config)
    assert metrics["queries"] == len(sentences) and metrics["clips"] == len(videos) and metrics["dropped"] == 1
    assert metrics["video_to_text"]["queries"] == len(videos)
    assert metrics["R@10"] == 100, "six videos are all among the first ten"
    rows = read_json_lines(tmp_path / "m" / "predictions.jsonl")
    assert len(rows) == len(sentences) and all(1 <= row["rank"] <= len(videos) for row in rows)
    assert rows[0]["end"] == pytest.approx(Shards(tokens / "test").seconds()[0])

    described = [{"video": f"{v.video_id}.mov", "description": caption(s)} for v in videos for s in v.steps]
    didemo = write(tmp_path / "test_data.json", described)
    config = DiDeMoConfig(trained / "model", tokens / "test", didemo, tmp_path / "d" / "metrics.json")
    assert evaluate_didemo(config)["queries"] == len(videos)


@pytest.mark.slow
def test_actions_and_steps_are_found_zero_shot(
    trained: Path, tokens: Path, videos: list[KitchenVideo], tmp_path: Path
) -> None:
    names = sorted({label(step) for video in videos for step in video.steps})
    database = {
        video.video_id: {
            "subset": "testing",
            "annotation": [
                {"id": str(names.index(label(s)) + 1), "segment": [s.start, s.end], "label": label(s)}
                for s in video.steps
            ],
        }
        for video in videos
    }
    database["gone"] = database[videos[0].video_id]
    coin = write(tmp_path / "COIN.json", {"database": database})
    config = COINConfig(trained / "model", tokens / "test", coin, tmp_path / "coin" / "metrics.json")
    metrics = evaluate_coin(config)
    assert metrics["outside"] == "threshold", "this model's embeddings are normalised"
    assert metrics["videos"] == len(videos) and metrics["labels"] == len(names) and metrics["dropped"] == 1
    rows = read_json_lines(tmp_path / "coin" / "predictions.jsonl")
    (videos_read, _), seconds = read_coin(coin), Shards(tokens / "test").seconds()
    true = [video.per_second(int(count)) for video, count in zip(videos_read, seconds)]
    assert metrics["frame_accuracy"] == pytest.approx(
        frame_accuracy([np.array(row["labels"]) for row in rows], true), abs=0.01
    )

    steps = [label(step) for step in videos[0].steps]
    blocks = f"1\nA dish\nhttp://x\n{len(steps)}\n{','.join(steps)}\n\n"
    of_video = "".join(f"{n},{s.start},{s.end}\n" for n, s in enumerate(videos[0].steps, 1))
    release = crosstask_release(tmp_path / "release", blocks, {f"1_{videos[0].video_id}": of_video, "1_gone": of_video})
    config = CrossTaskConfig(
        trained / "model", tokens / "test", release, output=tmp_path / "c" / "metrics.json", templates=("a cook: {}",)
    )
    metrics = evaluate_crosstask(config)
    assert metrics["videos"] == 1 and metrics["dropped"] == 1 and metrics["tasks"] == {"1": metrics["recall"]}
    report(ReportConfig(tmp_path / "report.html", others=(tmp_path / "coin", tmp_path / "c")))
    page = (tmp_path / "report.html").read_text()
    assert "frame_accuracy" in page and str(metrics["recall"]) in page
    (row,) = read_json_lines(tmp_path / "c" / "predictions.jsonl")
    inside = [s.start // 1 <= t < np.ceil(s.end) for s, t in zip(videos[0].steps, row["seconds"])]
    assert metrics["recall"] == pytest.approx(100 * np.mean(inside), abs=0.01)


@pytest.mark.slow
def test_multiple_choice_questions_are_answered(
    trained: Path, tokens: Path, videos: list[KitchenVideo], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = sorted({caption(step) for video in videos for step in video.steps})[:4]
    with open(tmp_path / "qa.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["vid_key", "a1", "a2", "a3", "a4", "a5", "answer"])
        for number, video in enumerate(videos[:3]):
            writer.writerow([video.video_id, *choices, "something else", number])
    config = QuestionConfig(trained / "model", tokens / "test", tmp_path / "qa.csv", tmp_path / "qa" / "metrics.json")
    metrics = evaluate_questions(config)
    assert metrics["questions"] == 3 and metrics["chance"] == 20
    rows = read_json_lines(tmp_path / "qa" / "predictions.jsonl")
    assert metrics["accuracy"] == pytest.approx(
        100 * np.mean([row["answer"] == row["right"] for row in rows]), abs=0.01
    )
    words = ["evaluate", "msrvtt-qa", "--model", str(config.model), "--shards", str(config.shards)]
    assert main([*words, "--annotations", str(config.annotations), "--output", str(config.output)]) == 0
    assert "accuracy" in capsys.readouterr().out
    (tmp_path / "qa.csv").write_text((tmp_path / "qa.csv").read_text().replace("test_", "gone_"))
    with pytest.raises(InputError, match="holds none of the 3 annotated videos"):
        evaluate_questions(config)


@pytest.mark.slow
def test_templates_are_averaged_and_plain_text_is_the_default(trained: Path) -> None:
    model = VideoCLIP.from_pretrained(trained / "model")
    plain = model.encode_text(["stir the egg"]).numpy()
    np.testing.assert_allclose(embed_texts(model, ["stir the egg"]), plain, atol=1e-6)
    both = embed_texts(model, ["stir the egg"], ["{}", "now we {}"])
    mean = (plain + model.encode_text(["now we stir the egg"]).numpy()) / 2
    np.testing.assert_allclose(both, mean / np.linalg.norm(mean), atol=1e-6)
    for templates in (["no place"], ["{} and {}"], []):
        with pytest.raises(InputError, match="template"):
            embed_texts(model, ["stir the egg"], templates)
