"""BERT's post-norm transformer on packed sequences: what video and text share, and all that is trained of it.

Linear layers see all sequences as one long matrix, attention sees runs of sequences of equal length as views of it:
sort a batch by length first (`Packed.by_length`). Parameter names are BERT's, so a BERT folder or the public release
loads without a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.packed import Packed, to_device


@dataclass(frozen=True)
class TransformerShape:
    """The size of a transformer, whichever system it serves. The defaults are BERT-base."""

    width: int = 768
    heads: int = 12
    intermediate: int = 3072
    """Width of the feed-forward layer."""
    layers: int = 12
    dropout: float = 0.1
    positions: int = 512
    """Most rows of one sequence, special ones included."""


class SelfAttention(nn.Module):
    """Multi-head self-attention inside each sequence, in both directions."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)

    def forward(self, x: Packed) -> Tensor:
        """Rows [N, width] -> [N, width]; attention stays inside a sequence."""
        dropout = self.dropout if self.training else 0.0
        query, key, value = (  # (N, heads, width / heads)
            layer(x.rows).unflatten(1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        if x.rows.is_cuda:
            return attention_of_all_lengths(query, key, value, x, dropout).flatten(1)
        outputs = []
        for run in zip(*(x.with_rows(rows).by_run() for rows in (query, key, value))):
            q, k, v = (rows.transpose(1, 2) for rows in run)  # (count, heads, length, width / heads), views
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))  # (count * length, width)
        return torch.cat(outputs)


def attention_of_all_lengths(query: Tensor, key: Tensor, value: Tensor, x: Packed, dropout: float = 0.0) -> Tensor:
    """One kernel for all lengths, [N, heads, width / heads] each: on CUDA flash attention in half precision, else the
    memory-efficient one, dropout included, which `varlen_attn` has not.

    PyTorch reaches both through jagged tensors; on a CPU these are slower than runs of equal length.
    """
    bounds, longest = x.bounds(query.device)
    shortest = int(x.lengths.min())
    query, key, value = (  # (B, heads, jagged, width / heads)
        torch.nested.nested_tensor_from_jagged(rows, bounds, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
        for rows in (query, key, value)
    )
    attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return attended.transpose(1, 2).values()


class Attention(nn.Module):
    """Self-attention, output projection and residual LayerNorm."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self = SelfAttention(shape)
        self.output = ResidualOutput(shape.width, shape)

    def forward(self, x: Packed) -> Tensor:
        return self.output(self.self(x), x.rows)


class ResidualOutput(nn.Module):
    """BERT's post-norm: LayerNorm(residual + dropout(linear(x)))."""

    def __init__(self, width: int, shape: TransformerShape) -> None:
        super().__init__()
        self.dense = nn.Linear(width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Intermediate(nn.Module):
    """The wide layer of the feed-forward block."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.width, shape.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One BERT block on rows [N, width]."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.intermediate = Intermediate(shape)
        self.output = ResidualOutput(shape.intermediate, shape)

    def forward(self, x: Packed) -> Packed:
        attended = self.attention(x)
        return x.with_rows(self.output(self.intermediate(attended), attended))


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, and their LayerNorm."""

    def __init__(self, shape: TransformerShape, vocabulary: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, shape.width)
        self.position_embeddings = nn.Embedding(shape.positions, shape.width)
        self.token_type_embeddings = nn.Embedding(2, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor) -> Tensor:
        """`tokens` [N, width], already embedded; `positions`, `token_types` int64 [N]."""
        positions, token_types = to_device(positions, tokens.device), to_device(token_types, tokens.device)
        x = tokens + self.position_embeddings(positions) + self.token_type_embeddings(token_types)
        return self.dropout(self.LayerNorm(x))


class Encoder(nn.Module):
    """A stack of `shape.layers` blocks."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def forward(self, x: Packed) -> Packed:
        for layer in self.layer:
            x = layer(x)
        return x


class Bert(nn.Module):
    """Embeddings and encoder, named as a BERT folder names them."""

    def __init__(self, shape: TransformerShape, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape, vocabulary)
        self.encoder = Encoder(shape)

    def forward(self, embedded: Packed, positions: Tensor, token_types: Tensor) -> Packed:
        """Rows [N, width], already embedded, with `positions` and `token_types`, int64 [N] -> outputs."""
        return self.encoder(embedded.with_rows(self.embeddings(embedded.rows, positions, token_types)))


def initialise_as_bert(module: nn.Module) -> None:
    """BERT's initialisation, for `module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def compile_blocks(module: nn.Module) -> None:
    """Compile, in place, what follows every large matrix product: bias, GELU, dropout, residual and LayerNorm in one.

    Attention and what lays sequences end to end stay as they are; names of parameters too. Takes a compiler.
    """
    for part in module.modules():
        if isinstance(part, (Intermediate, ResidualOutput)):
            part.compile(dynamic=True)
