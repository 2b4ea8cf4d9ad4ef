"""The text side of a two-tower model of transformers (CLIP, SigLIP, Perception Encoder, …), beside its images.

`ImageEncoder` holds the whole model; this knows how its texts are wrapped, padded and read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.words import TOKENIZER_FILE, WordTokenizer
from videoclip.errors import InputError
from videoclip.packed import Packed

# These were trained on texts filled up to the longest, and read at the last position whatever stands there.
FILLED_UP = ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model")


def read_text_tokenizer(folder_or_id: str, network: Any) -> WordTokenizer | None:
    """The tokenizer of a two-tower model; None for a model of images alone, or one that comes without tokenizer.json.

    Raises InputError if the tokenizer knows more words than the model.
    """
    if not hasattr(network, "get_text_features"):
        return None
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(folder_or_id, TOKENIZER_FILE)
    except (OSError, ValueError):
        return None  # its images can be used all the same; `ImageEncoder.text_tower` says what is missing
    words = WordTokenizer.load(Path(str(path)).parent)
    check_belongs(words, network, folder_or_id)
    return words


def load_text_tokenizer(folder: Path, fingerprint: str, network: Any) -> WordTokenizer:
    """The tokenizer saved beside an encoder. Raises InputError if it is another than the encoder was saved with."""
    words = WordTokenizer.load(folder)
    if words.fingerprint() != fingerprint:
        raise InputError(f"{folder / TOKENIZER_FILE}: not the tokenizer of the encoder that is saved here")
    check_belongs(words, network, folder)
    return words


def check_belongs(words: WordTokenizer, network: Any, where: Path | str) -> None:
    """Raises InputError if a tokenizer knows words that the text side does not."""
    rows = network.config.text_config.vocab_size
    if words.vocabulary > rows:
        raise InputError(
            f"{where}: its tokenizer knows {words.vocabulary} words but its text side {rows}: "
            "they do not belong together"
        )


class TextTower:
    """Word ids `start, words, end` to embeddings and word states, through the frozen network of an encoder."""

    def __init__(self, network: Any, words: WordTokenizer) -> None:
        self.network, self.words = network, words
        text = network.config.text_config
        self.filled_up = network.config.model_type in FILLED_UP
        self.without_start = _has_no_start(words)
        self.positions = int(text.max_position_embeddings)
        self.pad_id = int(text.pad_token_id) if getattr(text, "pad_token_id", None) is not None else 0
        self.table = _word_table(network)
        self.width = self.table.embedding_dim + int(text.hidden_size)
        """Of a word's state."""

    @property
    def max_words(self) -> int:
        """Most words between start and end."""
        return self.positions - (1 if self.without_start else 2)

    @torch.no_grad()
    def encode(self, word_ids: Packed) -> tuple[Tensor, Packed]:
        """Rows int [N] of B texts -> embeddings float32 [B, D], as the model has them (not of unit length), and states
        of the words, rows float32 [M, width]; M is N, less the start words of models without.

        A word's state is what it is looked up as, and its state behind the last layer, each with mean 0 and variance 1.
        The last alone would not do: a model that is read at the end word leaves in the others what it pleases.

        Raises InputError for a text longer than the model's positions, or unknown words.
        """
        self._check(word_ids)
        device = next(self.network.parameters()).device
        if self.without_start:
            kept = torch.ones(len(word_ids.rows), dtype=torch.bool)
            kept[word_ids.starts] = False
            word_ids = Packed(word_ids.rows[kept.to(word_ids.rows.device)], word_ids.lengths - 1)
        ids = word_ids.to(device, torch.int64)
        embeddings: list[Tensor] = [torch.empty(0)] * len(ids)
        states = list(embeddings)
        texts = ids.split()
        for length in ids.lengths.unique().tolist():  # of equal length together, so that nothing is padded
            places = (ids.lengths == length).nonzero().ravel().tolist()
            embedded, hidden = self._embed(torch.stack([texts[place] for place in places]))
            for place, vector, rows in zip(places, embedded, hidden):
                embeddings[place], states[place] = vector, rows[:length]
        return torch.stack(embeddings).float(), Packed(torch.cat(states).float(), ids.lengths)

    def _embed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, L] -> [B, D] and [B, L or more, W]."""
        options: dict[str, Tensor] = {}
        if self.filled_up:
            ids = torch.nn.functional.pad(ids, (0, self.positions - ids.shape[1]), value=self.pad_id)
        else:
            options["attention_mask"] = torch.ones_like(ids)
        output = self.network.get_text_features(input_ids=ids, **options)
        if isinstance(output, Tensor):
            embedded, last = output, self.network.text_model(input_ids=ids, **options).last_hidden_state
        else:
            embedded, last = output.pooler_output, output.last_hidden_state
        parts = [F.layer_norm(part, part.shape[-1:]) for part in (self.table(ids), last)]
        return embedded, torch.cat(parts, -1)

    def _check(self, word_ids: Packed) -> None:
        longest, ids = int(word_ids.lengths.max()), word_ids.rows
        if longest > self.max_words + 2 or int(word_ids.lengths.min()) < 2:
            raise InputError(f"a text must be a start word, at most {self.max_words} words, an end word")
        if int(ids.min()) < 0 or int(ids.max()) >= self.network.config.text_config.vocab_size:
            raise InputError(f"word id {int(ids.max())} is unknown to the text side; another tokenizer cut the text")


def _word_table(network: Any) -> nn.Embedding:
    """What a text side looks words up in. Raises InputError if it has no such table."""
    rows = network.config.text_config.vocab_size
    for module in network.text_model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == rows:
            return module
    raise InputError(f"a text side of the kind {network.config.model_type} has no table of its {rows} words")


def _has_no_start(words: WordTokenizer) -> bool:
    """Whether the model's texts have an end word only, as SigLIP's have: its own tokenizer then adds no other."""
    whole, plain = words.tokenizer.encode("a").ids, words.tokenizer.encode("a", add_special_tokens=False).ids
    return words.cls_id == words.sep_id or whole == [*plain, words.sep_id]
