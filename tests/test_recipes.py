"""A second system lives in the house: its file, its test, one line of the table."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.cli import main
from pipelines.index import IndexConfig, build_index
from pipelines.pretrain import pretrain
from pipelines.search import SearchConfig, search
from tests.conftest import training
from videoclip.convert.initialise import initialise
from videoclip.data.shards import Shards
from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.files import read_json, read_json_lines
from videoclip.recipes import from_pretrained, margin, videoclip
from videoclip.training import OptimizerConfig


@pytest.mark.slow
def test_another_recipe_is_trained_saved_loaded_and_searched_by_its_name(
    ray: None, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = f"pretrain --shards {tokens / 'train'} --output {run} --recipe margin --epochs 2 --videos-per-batch 3"
    words += " --model.width 32 --model.layers 1 --model.heads 2 --vocabulary 300 --clips.clips-per-video 4"
    words += " --clips.max-words 24 --clips.max-seconds 16 --optimizer.learning-rate 1e-3 --threads 1"
    assert main(words.split()) == 0
    assert read_json(run / "model" / "config.json")["recipe"] == "margin"
    model = from_pretrained(run / "model")
    assert isinstance(model, margin.Recipe)
    losses = [row["loss"] for row in read_json_lines(run / "metrics.jsonl")]
    assert len(losses) == 2 * 3 and 0 < losses[0] < 1, "a margin of 0.1 in two directions, not a cross-entropy"
    build_index(IndexConfig(run / "model", tokens / "test", output=tmp_path / "index"))
    assert search(SearchConfig("stir the carrot", run / "model", tmp_path / "index", count=3))
    assert main(["pretrain", "--shards", "x", "--recipe", "nothing"]) == 2
    assert "unknown recipe 'nothing'; choose one of videoclip" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_starts_from_an_earlier_model_and_its_words(
    ray: None, trained: Path, tokens: Path, tmp_path: Path
) -> None:
    still = OptimizerConfig(learning_rate=0.0)
    config = training(tokens, tmp_path / "run", init=str(trained / "model"), epochs=1, seed=9, optimizer=still)
    pretrain(config)
    same = (config.output / "text" / "tokenizer.json").read_bytes()
    assert same == (trained / "text" / "tokenizer.json").read_bytes()
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (trained, config.output))
    assert all(torch.equal(before[name], value) for name, value in after.items())
    wider = videoclip.Options(48, 1, heads=2)
    with pytest.raises(InputError, match="another shape"):
        pretrain(training(tokens, tmp_path / "other", init=str(trained / "model"), model=wider))


def bert(folder: Path, tokenizer: WordTokenizer, layers: int) -> None:
    """A BERT's folder as the hub has them, with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=tokenizer.vocabulary,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save(folder)


def test_the_papers_start_is_bert_and_its_first_layers_for_video(tokens: Path, trained: Path, tmp_path: Path) -> None:
    tokenizer = WordTokenizer.load(trained / "text")
    bert(tmp_path / "bert", tokenizer, 4)
    options = videoclip.Options(32, 4, heads=2, transformer="separate", max_seconds=16, max_words=24)
    model = videoclip.build(options, Shards(tokens / "train").manifest, tokenizer)
    assert len(model.video_encoder.bert.encoder.layer) == 2, "half as many as the text's, as 6 are of 12"
    initialise(model, tmp_path / "bert")
    stored, state = load_file(tmp_path / "bert" / "model.safetensors"), model.state_dict()
    for layer in range(4):
        name = f"encoder.layer.{layer}.output.dense.weight"
        assert torch.equal(state[f"text_encoder.{name}"], stored[name])
        assert layer >= 2 or torch.equal(state[f"video_encoder.bert.{name}"], stored[name])
    special = state["video_encoder.bert.embeddings.word_embeddings.weight"]
    words = stored["embeddings.word_embeddings.weight"]
    assert torch.equal(special, words[[tokenizer.cls_id, tokenizer.sep_id]])
    save_file({"x": torch.zeros(1)}, tmp_path / "bert" / "model.safetensors")
    with pytest.raises(InputError, match="not a BERT"):
        initialise(model, tmp_path / "bert")
