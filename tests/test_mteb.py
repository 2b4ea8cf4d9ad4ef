"""The field's own harness runs its kind of task on a model, offline, on generated videos."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KITCHEN

from pipelines.evaluate_mteb import MTEBConfig, evaluate_mteb, run_tasks_of_mteb
from pipelines.figures import Figures
from videoclip.errors import InputError
from videoclip.evaluation.retrieval import ranks_of_positives
from videoclip.files import read_json
from videoclip.model import VideoCLIP
from videoclip.synthetic.kitchen import caption, plan_kitchen

pytestmark = pytest.mark.slow
pytest.importorskip("mteb", reason="the extra `mteb` is not installed")


def kitchen_task(folder: Path, in_memory: bool) -> Any:
    """Text-to-video retrieval over the corpus's test videos, each described by its first step, as mteb's tasks are."""
    from datasets import Dataset, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    planned = [video for video in plan_kitchen(KITCHEN) if video.split == "test"]
    paths = [folder / f"{video.video_id}.mp4" for video in planned]

    class KitchenT2V(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="KitchenT2VRetrieval",
            description="Generated cooking videos.",
            dataset={"path": "local/kitchen", "revision": "1"},
            type="Any2AnyRetrieval",
            category="t2v",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            modalities=["text", "video"],
        )

        def load_data(self, **_: Any) -> None:
            videos = [path.read_bytes() if in_memory else str(path) for path in paths]
            ids = [str(number) for number in range(len(planned))]
            queries = Dataset.from_dict({"id": ids, "text": [caption(video.steps[0]) for video in planned]})
            corpus = Dataset.from_dict({"id": ids, "video": videos}).cast_column("video", Video())
            data = RetrievalSplitData(
                queries=queries, corpus=corpus, relevant_docs={i: {i: 1} for i in ids}, top_ranked=None
            )
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    return KitchenT2V()


def naming_task(folder: Path) -> Any:
    """Zero-shot classification of the same videos by what their first steps are, as mteb's tasks of that kind are."""
    from datasets import Dataset, DatasetDict, Video
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    planned = [video for video in plan_kitchen(KITCHEN) if video.split == "test"]

    class KitchenZeroShot(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="KitchenZeroShot",
            description="Generated cooking videos.",
            dataset={"path": "local/kitchen", "revision": "1"},
            type="VideoZeroshotClassification",
            category="v2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
            modalities=["video", "text"],
        )
        input_column_name = "video"

        def get_candidate_labels(self) -> list[str]:
            return [caption(video.steps[0]) for video in planned]

        def load_data(self, **_: Any) -> None:
            videos = [str(folder / f"{video.video_id}.mp4") for video in planned]
            rows = Dataset.from_dict({"video": videos, "label": list(range(len(planned)))})
            self.dataset = DatasetDict(test=rows.cast_column("video", Video()))
            self.data_loaded = True

    return KitchenZeroShot()


def first_step_ranks(model: VideoCLIP, folder: Path) -> np.ndarray:
    planned = [video for video in plan_kitchen(KITCHEN) if video.split == "test"]
    videos = [model.encode_video(folder / f"{v.video_id}.mp4").numpy() for v in planned]
    texts = model.encode_text([caption(video.steps[0]) for video in planned]).numpy()
    return ranks_of_positives(texts, np.stack(videos))


def test_a_benchmark_of_several_kinds_of_tasks_runs_offline(
    trained: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mteb

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = corpus / "test" / "videos"
    known = {"Kitchen": mteb.Benchmark("Kitchen", [kitchen_task(folder, True), naming_task(folder)])}
    monkeypatch.setattr(mteb, "get_benchmark", known.__getitem__)
    metrics = evaluate_mteb(MTEBConfig(trained / "model", benchmark="Kitchen", output=tmp_path / "metrics.json"))
    ranks = first_step_ranks(VideoCLIP.from_pretrained(trained / "model"), folder)
    assert metrics["KitchenT2VRetrieval"]["R@1"] == pytest.approx(100 * (ranks <= 1).mean(), abs=0.01)
    assert set(metrics["KitchenZeroShot"]) == {"main_score"} and 0 <= metrics["KitchenZeroShot"]["main_score"] <= 100


def test_the_benchmark_of_texts_and_videos_is_known_by_its_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(model: VideoCLIP, revision: str, tasks: list[Any], config: MTEBConfig) -> Figures:
        asked.extend(tasks)  # their data comes from the hub
        return Figures({})

    monkeypatch.setattr("pipelines.evaluate_mteb.run_tasks_of_mteb", run)
    evaluate_mteb(MTEBConfig(trained / "model", benchmark="MVEB(text, video)", output=tmp_path / "m.json"))
    assert len(asked) > 10 and all(set(task.metadata.modalities) <= {"text", "video"} for task in asked)
    with pytest.raises(InputError, match="mteb knows no such benchmark"):
        evaluate_mteb(MTEBConfig(trained / "model", benchmark="MVEB(smell)", output=tmp_path / "m.json"))


def test_a_task_of_the_harness_runs_offline(
    trained: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = VideoCLIP.from_pretrained(trained / "model")
    config = MTEBConfig(trained / "model", output=tmp_path / "metrics.json")
    metrics = run_tasks_of_mteb(model, "1", [kitchen_task(corpus / "test" / "videos", False)], config)
    ranks = first_step_ranks(model, corpus / "test" / "videos")
    of_task = metrics["KitchenT2VRetrieval"]
    assert of_task["R@1"] == pytest.approx(100 * (ranks <= 1).mean(), abs=0.01)
    assert of_task["R@5"] == pytest.approx(100 * (ranks <= 5).mean(), abs=0.01)
    assert read_json(tmp_path / "metrics.json") == metrics
    assert list((tmp_path / "results").rglob("KitchenT2VRetrieval.json")), "mteb keeps its own record"


def test_frozen_towers_are_measured_with_no_training(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--model frozen --shards FOLDER`: the folder's own two-tower model, whose figures are those of `encode_…`."""
    import mteb
    from test_towers import hub_folder

    from videoclip.data.captions import NO_CAPTIONS
    from videoclip.data.shards import Manifest, ShardWriter, VideoRecord
    from videoclip.encoders.image import ImageEncoder
    from videoclip.recipes.towers import frozen_towers

    hub_folder(tmp_path / "hub")
    encoder = ImageEncoder.from_pretrained(str(tmp_path / "hub"))
    encoder.save(tmp_path / "shards")
    writer = ShardWriter(tmp_path / "shards", Manifest(encoder.name, encoder.fingerprint(), encoder.dimension))
    writer.add(VideoRecord("v", 2.0, np.zeros((2, encoder.dimension), np.float16), NO_CAPTIONS))
    writer.close()
    task = kitchen_task(corpus / "test" / "videos", False)
    monkeypatch.setattr(mteb, "get_task", lambda name: task)
    config = MTEBConfig(Path("frozen"), tmp_path / "shards", ("KitchenT2VRetrieval",), output=tmp_path / "metrics.json")
    metrics = evaluate_mteb(config)["KitchenT2VRetrieval"]
    model, planned = frozen_towers(tmp_path / "shards"), [v for v in plan_kitchen(KITCHEN) if v.split == "test"]
    videos = [model.encode_video(corpus / "test" / "videos" / f"{v.video_id}.mp4").numpy() for v in planned]
    texts = model.encode_text([caption(video.steps[0]) for video in planned]).numpy()
    assert metrics["R@1"] == pytest.approx(100 * (ranks_of_positives(texts, np.stack(videos)) <= 1).mean(), abs=0.01)
    with pytest.raises(InputError, match="give --shards, too"):
        evaluate_mteb(MTEBConfig(Path("frozen"), tasks=("KitchenT2VRetrieval",)))


def test_a_video_that_cannot_be_decoded_is_named_and_the_others_are_embedded(trained: Path, corpus: Path) -> None:
    from datasets import Dataset, Video
    from torch.utils.data import DataLoader

    from videoclip.evaluation.mteb_model import VideoCLIPForMTEB

    good = corpus / "test" / "videos" / "test_0000.mp4"
    rows = Dataset.from_dict({"video": [b"not a video", good.read_bytes()]}).cast_column("video", Video())
    model = VideoCLIPForMTEB(VideoCLIP.from_pretrained(trained / "model"))
    with pytest.warns(UserWarning, match="video 0 of the task is left out"):
        features = model.encode(DataLoader(rows), show_progress_bar=False)
    assert not features[0].any() and features[1].any()
    with warnings.catch_warnings(), pytest.raises(InputError, match="neither text nor video"):
        model.encode(DataLoader(Dataset.from_dict({"audio": [1]})))


def test_a_task_that_mteb_does_not_know_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mteb knows no such task"):
        evaluate_mteb(MTEBConfig(trained / "model", tasks=("YouCook3",), output=tmp_path / "m.json"))
