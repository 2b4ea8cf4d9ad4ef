"""BERT's post-norm transformer on packed sequences: what video and text share, and all that is trained of it.

Sequences of different lengths are concatenated instead of padded: linear layers see one long matrix, attention sees
runs of sequences of equal length as views of it. Parameter names are BERT's, so a BERT folder or the public release
loads without a map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from videoclip.model import VideoCLIPConfig


@dataclass(frozen=True)
class Packing:
    """Sequences sorted by length and laid end to end.

    `order`: int64 [B], which sequence comes 1st, 2nd, …; `lengths`: int64 [B], in that order, on the CPU;
    `runs`: (number of sequences, their length) of equal-length runs. `starts`: int64 [B], first row of each.
    """

    order: Tensor
    lengths: Tensor
    starts: Tensor
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """`lengths`: int64 [B], each at least 1."""
        ordered, order = torch.sort(lengths.cpu(), stable=True)
        values, counts = torch.unique_consecutive(ordered, return_counts=True)
        starts = torch.cumsum(ordered, 0) - ordered
        return cls(order, ordered, starts, list(zip(counts.tolist(), values.tolist())))

    def positions(self) -> Tensor:
        """int64 [sum of lengths]: 0, 1, … within each sequence."""
        return torch.arange(int(self.lengths.sum())) - torch.repeat_interleave(self.starts, self.lengths)

    def rows_of(self, lengths: Tensor) -> Tensor:
        """Row indices that bring sequences laid end to end in their original order into this order."""
        original_starts = (torch.cumsum(lengths, 0) - lengths)[self.order]
        return torch.repeat_interleave(original_starts, lengths[self.order]) + within_sequences(lengths[self.order])


def within_sequences(lengths: Tensor) -> Tensor:
    """0, 1, …, n - 1 for each n of `lengths`, concatenated."""
    return torch.arange(int(lengths.sum())) - torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)


class SelfAttention(nn.Module):
    """Multi-head self-attention inside each sequence of a packing."""

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, width] of sequences end to end, as `packing` says -> [N, width]; attention stays inside a sequence."""
        dropout = self.dropout if self.training else 0.0
        query, key, value = (layer(x).unflatten(1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        if x.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
            return _variable_length_attention(query, key, value, packing).flatten(1)
        outputs, row = [], 0
        for count, length in packing.runs:
            # [count * length, heads, d] -> [count, heads, length, d], a view
            q, k, v = (
                t[row : row + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (query, key, value)
            )
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            outputs.append(attended.transpose(1, 2).reshape(count * length, -1))
            row += count * length
        return torch.cat(outputs)


def _variable_length_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """One kernel for all lengths; PyTorch has it for half precision on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    ends = F.pad(torch.cumsum(packing.lengths, 0), (1, 0)).to(query.device, torch.int32)
    longest = packing.runs[-1][1]
    attended = varlen_attn(query, key, value, ends, ends, longest, longest)
    assert isinstance(attended, Tensor)  # a tuple only where auxiliary outputs are asked for
    return attended


class Attention(nn.Module):
    """Self-attention, output projection and residual LayerNorm."""

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.width, config)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return self.output(self.self(x, packing), x)


class ResidualOutput(nn.Module):
    """BERT's post-norm: LayerNorm(residual + dropout(linear(x)))."""

    def __init__(self, width: int, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Intermediate(nn.Module):
    """The wide layer of the feed-forward block."""

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One BERT block on packed rows [N, H]."""

    def __init__(self, config: VideoCLIPConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate, config)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        x = self.attention(x, packing)
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, and their LayerNorm."""

    def __init__(self, config: VideoCLIPConfig, vocabulary: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, config.width)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor) -> Tensor:
        """`tokens` [N, H], already embedded; `positions`, `token_types` int64 [N]."""
        x = tokens + self.position_embeddings(positions) + self.token_type_embeddings(token_types)
        return self.dropout(self.LayerNorm(x))


class Encoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config: VideoCLIPConfig, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(layers))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        for layer in self.layer:
            x = layer(x, packing)
        return x


class Bert(nn.Module):
    """Embeddings and encoder, named as a BERT folder names them."""

    def __init__(self, config: VideoCLIPConfig, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, vocabulary)
        self.encoder = Encoder(config, layers)
