"""Frozen text encoders of the BERT family, through transformers: words to hidden states."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videoclip.data.words import WordTokenizer
from videoclip.errors import InputError
from videoclip.files import atomic_path
from videoclip.packed import Packed


class FrozenTextEncoder(nn.Module):
    """A Hugging Face text encoder, frozen, from a local folder or a hub id (BERT, MobileBERT, MiniLM, …).

    `dimension` is the width of its hidden states, `tokenizer` its own.
    Raises InputError if there is no such model or it has no fast tokenizer.
    """

    def __init__(self, folder_or_id: str) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        try:
            self.network = AutoModel.from_pretrained(folder_or_id)
            tokenizer = AutoTokenizer.from_pretrained(folder_or_id)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{folder_or_id}: no text encoder that transformers can load ({reason})") from None
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"{folder_or_id}: has no fast tokenizer (tokenizer.json)")
        self.name = str(folder_or_id)
        self.is_local = Path(folder_or_id).is_dir()
        self.tokenizer = WordTokenizer(tokenizer.backend_tokenizer, folder_or_id)
        self.dimension = int(self.network.config.hidden_size)
        rows = self.network.get_input_embeddings().num_embeddings
        if self.tokenizer.vocabulary > rows:
            raise InputError(
                f"{folder_or_id}: its tokenizer knows {self.tokenizer.vocabulary} words but its embedding table {rows}"
            )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenTextEncoder:
        """Stays in evaluation mode: dropout would make frozen tokens random."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Word ids and mask [B, L] -> hidden states of the last layer, float32 [B, L, dimension]."""
        return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()

    @torch.no_grad()
    def encode_packed(self, word_ids: Packed) -> Packed:
        """Word ids, rows int64 [N] -> hidden states, rows float32 [N, dimension].

        Texts of equal length go through the network together, so that nothing is padded.
        """
        hidden = torch.empty(len(word_ids.rows), self.dimension, device=word_ids.rows.device)
        for length in word_ids.lengths.unique().tolist():
            rows = word_ids.starts[word_ids.lengths == length][:, None] + torch.arange(length)
            rows = rows.to(word_ids.rows.device)
            ids = word_ids.rows[rows]  # (texts, length)
            hidden[rows] = self(ids, torch.ones_like(ids))
        return word_ids.with_rows(hidden)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over every weight and the tokenizer."""
        digest = hashlib.sha256(self.tokenizer.fingerprint().encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Copy a local encoder into `folder/text_encoder`; one from the hub is found again by its id."""
        if self.is_local:
            target: Any = Path(folder) / "text_encoder"
            self.network.save_pretrained(target)
            self.tokenizer.save(target)
            with atomic_path(target / "tokenizer_config.json") as temporary:
                temporary.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
