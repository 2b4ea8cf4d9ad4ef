"""The real stages on a tiny corpus through a real local Ray, with faults made on purpose."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import KITCHEN, kill_first_worker, training

from pipelines.cli import VERBS, main
from pipelines.cluster import ClusterConfig, cluster
from pipelines.evaluate_moments import MomentConfig, evaluate_moments
from pipelines.evaluate_retrieval import RetrievalConfig, evaluate_retrieval
from pipelines.pretrain import PretrainConfig, _with_limits, pretrain
from pipelines.pretrain_batches import BatchPlan, cluster_to_file
from pipelines.report import ReportConfig, report
from videoclip.data.clips import ClipSampler
from videoclip.data.shards import Shards
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.files import read_json, read_json_lines
from videoclip.model import VideoCLIP
from videoclip.packed import Packed
from videoclip.recipes.videoclip import Options, build
from videoclip.retrieval.epochs import BatchOptions, Clustering
from videoclip.retrieval.false_negatives import FalseNegativeConfig
from videoclip.synthetic.kitchen import plan_kitchen
from videoclip.training import EpochBatches, learning_rate_at, make_optimizer, spread_batches, step

pytestmark = pytest.mark.slow


# --- Pretraining --------------------------------------------------------------------------------------------------


def weights(run: Path) -> dict[str, torch.Tensor]:
    return VideoCLIP.from_pretrained(run / "model").state_dict()


def test_a_run_folder_says_what_made_it(trained: Path) -> None:
    description = json.loads((trained / "pretrain.json").read_text())
    assert description["configuration"]["seed"] == 0 and "torch" in description["versions"]
    rows = read_json_lines(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) == 9
    assert sum("batches/cosine" in row for row in rows) == 3, "videos are clustered once an epoch"
    assert list((trained / "tensorboard").glob("events*"))
    assert len(list((trained / "checkpoints").glob("epoch-*"))) == 2


def test_every_epoch_uses_each_captioned_video_once(trained: Path) -> None:
    for path in (trained / "batches").glob("*.npz"):
        assert sorted(np.load(path)["rows"].tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]  # the fifth has no captions


def test_the_model_encodes_files_and_words_as_extraction_did(trained: Path, tokens: Path, corpus: Path) -> None:
    model = VideoCLIP.from_pretrained(trained / "model")
    video = model.encode_video(corpus / "test" / "videos" / "test_0000.mp4", start=3.0, end=9.0)
    with torch.inference_mode():
        extracted = torch.from_numpy(np.array(Shards(tokens / "test").tokens(0)[3:9]))
        expected = model.embed_video(Packed(extracted, torch.tensor([6])))[0]
    torch.testing.assert_close(video, expected, atol=2e-3, rtol=0)
    assert model.encode_text(["stir the carrot", "press the egg"]).shape == (2, 32)


def test_a_killed_run_continues_and_ends_with_the_same_weights(tokens: Path, trained: Path, tmp_path: Path) -> None:
    """Kill the whole process group after the first checkpoint; run the same command again."""
    config = training(tokens, tmp_path / "run")
    (tmp_path / "options.yaml").write_text(
        f"shards: {config.shards}\noutput: {config.output}\nepochs: 3\nvideos_per_batch: 3\n"
        "vocabulary: 300\nthreads: 1\n"
        "model: {width: 32, layers: 1, heads: 2}\nclips: {clips_per_video: 4, max_words: 24, max_seconds: 16}\n"
        "optimizer: {learning_rate: 0.001, warmup_steps: 4}\n"
    )
    command = [sys.executable, "-m", "pipelines.cli", "pretrain", "--config", str(tmp_path / "options.yaml")]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, start_new_session=True, stderr=subprocess.DEVNULL)
    first = config.output / "checkpoints" / "epoch-0001" / "state.json"
    deadline = time.time() + 120
    while not first.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for victim in [*children, psutil.Process(process.pid)] if children else []:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    assert first.exists() and not (config.output / "model").exists(), "killed between two checkpoints"
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, value in weights(trained).items():
        torch.testing.assert_close(weights(config.output)[name], value, rtol=0, atol=0, msg=name)
    rows = read_json_lines(config.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9)), "no step is missing or told twice"


def test_a_killed_training_worker_is_replaced(ray: None, tokens: Path, trained: Path, tmp_path: Path) -> None:
    config = training(tokens, tmp_path / "run")
    first = config.output / "checkpoints" / "epoch-0001" / "state.json"
    killed, thread = kill_first_worker("RayTrainWorker", first.exists)
    pretrain(config)
    thread.join()
    assert killed, "the test must have killed a worker"
    for name, value in weights(trained).items():
        torch.testing.assert_close(weights(config.output)[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("similarity", ["tokens", "teacher"])
def test_videos_are_compared_by_tokens_or_by_a_teacher(
    ray: None, tokens: Path, trained: Path, tmp_path: Path, similarity: str
) -> None:
    source = str(trained / "model") if similarity == "teacher" else similarity
    config = training(tokens, tmp_path / "run", similarity=source, videos_per_batch=4, clusters_per_batch=2)
    pretrain(config)
    clusterings = [Clustering.load(path) for path in sorted((config.output / "batches").glob("clustering-*.npz"))]
    assert len(clusterings) == config.epochs
    for clustering in clusterings:
        assert sorted(np.concatenate(clustering.batches).tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    shown = [row for row in read_json_lines(config.output / "metrics.jsonl") if "batches/cosine" in row]
    assert [row["batches/coverage"] for row in shown] == [100] * config.epochs
    assert all(row["batches/cluster_cosine"] > row["batches/random_cosine"] for row in shown)
    assert not list((config.output / "batches").glob("embeddings-*")), "embeddings are cleared away"


def test_a_video_without_a_finite_embedding_is_quarantined_and_the_others_are_clustered(
    tokens: Path, tmp_path: Path
) -> None:
    rows = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9])
    embeddings = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float16)
    embeddings[4, 3], embeddings[8, 0] = np.nan, np.inf
    np.save(tmp_path / "a.npy", embeddings[:5])
    np.save(tmp_path / "b.npy", embeddings[5:])
    path, options = tmp_path / "clustering.npz", BatchOptions(3)
    shards = Shards(tokens / "train")
    cluster_to_file(shards, tmp_path, rows, [tmp_path / "a.npy", tmp_path / "b.npy"], path, options, 0)
    clustering = Clustering.load(path)
    assert clustering.left_out.tolist() == [5, 9]
    assert sorted(np.concatenate(clustering.batches).tolist()) == [0, 1, 2, 3, 6, 7, 8]
    quarantined = read_json_lines(tmp_path / "quarantine.jsonl")
    assert [row["video_id"] for row in quarantined] == ["train_0005", "train_0009"]
    np.save(tmp_path / "a.npy", np.full((9, 8), np.nan, np.float16))
    with pytest.raises(InputError, match="no video has a finite embedding"):
        cluster_to_file(shards, tmp_path, rows, [tmp_path / "a.npy"], tmp_path / "none.npz", options, 0)


def by_one_process(config: PretrainConfig) -> list[dict[str, float]]:
    """The figures of a run's steps, computed again by one process alone."""
    config = _with_limits(config)
    shards, tokenizer = Shards(config.shards), WordTokenizer.load(config.output / "text")
    sampler = ClipSampler(shards, tokenizer, config.clips, config.output)
    torch.manual_seed(config.seed)
    model = build(config.model, shards.manifest, tokenizer).train()
    optimizer, taken = make_optimizer(model, config.optimizer), []
    for epoch in range(config.epochs):
        clustering = Clustering.load(config.output / "batches" / f"clustering-{epoch:04d}.npz")
        steps = spread_batches(clustering.batches, config.batches_per_step)
        of_epoch = EpochBatches(sampler, steps, config.seed, epoch, 0, config.false_negatives, clustering.duplicates)
        for batch in of_epoch:
            rate = learning_rate_at(len(taken), config.epochs * len(steps), config.optimizer)
            taken.append(step(model, optimizer, batch, rate, config.optimizer.clip_norm))
    return taken


def test_two_workers_train_together_on_all_videos_as_one_would(
    ray: None, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of both, negatives of both, near-duplicates as clustering found them, and other clips every epoch."""
    monkeypatch.chdir(tmp_path)  # paths may be relative, though Ray's workers run elsewhere
    config = training(
        Path(os.path.relpath(tokens)),
        Path("run"),
        workers=2,
        batches_per_step=2,
        epochs=2,
        model=Options(width=32, layers=1, heads=2, dropout=0.0),
        false_negatives=FalseNegativeConfig(same_text=False, duplicate_similarity=0.05),
    )
    pretrain(config)
    rows = read_json_lines(config.output / "metrics.jsonl")
    assert len(rows) == 2 * 2, "nine videos are three batches, two steps of at most two"
    clustered = np.load(config.output / "batches" / "clustering-0001.npz")["rows"]
    assert sorted(clustered.tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert any(row["excluded"] > 0 for row in rows), "some are near-duplicates at so low a bar"
    for row, alone in zip(rows, by_one_process(config)):
        assert {name: row[name] for name in alone} == pytest.approx(alone, rel=2e-3, abs=1e-4)


def test_a_new_model_is_not_asked_what_is_similar() -> None:
    plan = BatchPlan(BatchOptions(), "model", 2, True, None, seed=0)
    assert [plan.source(epoch) for epoch in range(3)] == ["tokens", "model", "model"]
    assert replace(plan, from_nothing=False).source(0) == "model"
    assert replace(plan, similarity="runs/teacher").source(0) == "runs/teacher"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters_per_batch": 2}, "2 clusters do not divide a batch of 3"),
        ({"clusters_per_batch": 4}, "3 videos cannot make 4 clusters"),
        ({"clusters_per_batch": 3, "batches": "paper"}, "one cluster each"),
        ({"similarity": "/nowhere"}, "no model here"),
        ({"videos_per_batch": 0}, "at least 1"),
        ({"batches": "hard"}, "choose one of"),
        ({"clips_for_similarity": 0}, "at least 1"),
        ({"topics": Path("/nowhere.csv")}, "no such file"),
    ],
)
def test_batch_options_that_cannot_be_are_refused(
    tokens: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(training(tokens, tmp_path / "run", **changes))


def test_a_teacher_of_other_tokens_is_refused_before_anything_starts(
    tokens: Path, trained: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(trained / "model", teacher)
    config = read_json(teacher / "config.json")
    config["video_encoder"] = "another encoder"
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="the encoder the model was trained on"):
        pretrain(training(tokens, tmp_path / "run", similarity=str(teacher)))
    assert not (tmp_path / "run" / "batches").exists()


def test_a_run_with_other_options_is_refused(trained: Path, tokens: Path) -> None:
    with pytest.raises(InputError, match="other seed"):
        pretrain(training(tokens, trained, seed=5))


# --- Evaluation and clustering ------------------------------------------------------------------------------------


def test_evaluation_reads_the_same_shards(trained: Path, tokens: Path, corpus: Path, tmp_path: Path) -> None:
    retrieval = evaluate_retrieval(
        RetrievalConfig(
            trained / "model",
            tokens / "test",
            corpus / "youcookii_annotations_trainval.json",
            tmp_path / "y" / "m.json",
        )
    )
    steps = sum(len(v.steps) for v in plan_kitchen(KITCHEN) if v.split == "test")
    assert retrieval["queries"] == steps and retrieval["dropped"] == 0
    assert len(read_json_lines(tmp_path / "y" / "predictions.jsonl")) == steps
    moments = evaluate_moments(
        MomentConfig(
            corpus / "qvhighlights_val.jsonl",
            trained / "model",
            tokens / "test",
            train_annotations=corpus / "qvhighlights_train.jsonl",
            output=tmp_path / "q" / "m.json",
        )
    )
    assert set(moments["baseline"]) == set(moments["brief"])
    scored = evaluate_moments(
        MomentConfig(
            corpus / "qvhighlights_val.jsonl",
            predictions=tmp_path / "q" / "predictions.jsonl",
            output=tmp_path / "again.json",
        )
    )
    assert scored["brief"] == moments["brief"], "predictions are saved as they were scored"
    page = ReportConfig(
        tmp_path / "report.html",
        retrieval=tmp_path / "y",
        moments=tmp_path / "q",
        annotations=corpus / "qvhighlights_val.jsonl",
        training=trained,
        videos=corpus / "test" / "videos",
        examples=3,
    )
    for name in ("y", "q"):
        (tmp_path / name / "m.json").rename(tmp_path / name / "metrics.json")
    report(page)
    text = page.output.read_text()
    assert text.count("<svg") == 5 and text.count("data:image/jpeg") > 3 and "query-blind" in text
    with pytest.raises(InputError, match="nothing to report"):
        report(ReportConfig(tmp_path / "empty.html"))


def test_clustering_stands_alone(ray: None, trained: Path, tokens: Path, corpus: Path, tmp_path: Path) -> None:
    config = ClusterConfig(
        trained / "model", tokens / "train", tmp_path / "clusters", videos_per_batch=3, clips_per_video=2
    )
    batches = cluster(config)
    captioned = [f"train_{n:04d}" for n in range(10) if n != 4]
    assert sorted(video for batch in batches for video in batch) == captioned
    assert np.load(tmp_path / "clusters" / "embeddings.npy").shape == (9, 32)
    assert cluster(config) == batches
    assert json.loads((tmp_path / "clusters" / "cluster.json").read_text())["coverage"] == 100
    few = cluster(replace(config, videos_per_batch=100, topics=corpus / "train" / "HowTo100M_v1.csv"))
    assert [sorted(batch) for batch in few] == [captioned], "fewer videos than a batch are one batch"
    assert json.loads((tmp_path / "clusters" / "cluster.json").read_text())["purity"] > 50
    before = np.load(tmp_path / "clusters" / "embeddings.npy")
    cluster(replace(config, clips_per_video=5))
    assert not np.array_equal(np.load(tmp_path / "clusters" / "embeddings.npy"), before), "nothing stale is used again"


# --- The command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dance"], "unknown verb"),
        (["extract", "--videos", "/nowhere"], "no such folder"),
        (["extract", "--videos", "CORPUS", "--encoder", "vgg", "--output", "OUT"], "unknown encoder"),
        (["extract", "--videos", "CORPUS", "--captions", "/nowhere.json", "--output", "OUT"], "no such file"),
        (["pretrain", "--shards", "/nowhere"], "manifest.json"),
        (["evaluate", "qvhighlights", "--annotations", "/nowhere.jsonl"], "no such file"),
        (["demo", "--config", "/nowhere.yaml"], "no such file"),
        (["demo", "--epochs", "many"], "epochs"),
        (["extract", "--videos", "CORPUS", "--weights", "/nowhere", "--output", "OUT"], "weights"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    words: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"CORPUS": str(corpus / "test" / "videos"), "OUT": str(tmp_path / "out")}
    try:
        code = main([names.get(word, word) for word in words])
    except SystemExit as stop:  # options that do not parse are tyro's to explain
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err + printed.out and "Traceback" not in printed.err


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_there_for_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        main([*verb.split(), "--help"])
    except SystemExit as stop:
        assert not stop.code
    assert "videoclip" in capsys.readouterr().out


FULL_DISK = """
import resource, signal, sys
from pipelines.cli import VERBS, main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_clear_line(corpus: Path, tmp_path: Path) -> None:
    annotations = corpus / "qvhighlights_val.jsonl"
    rows = [{"qid": q["qid"], "pred_relevant_windows": [[0, 9, 1]]} for q in read_json_lines(annotations)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "qvhighlights", "--annotations", annotations, "--predictions", tmp_path / "p.jsonl"]
    command = [sys.executable, "-c", FULL_DISK, *map(str, words), "--output", str(tmp_path / "out" / "m.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "cannot write" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").iterdir()), "nothing half-written is left"
