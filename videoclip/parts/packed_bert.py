"""BERT's post-norm transformer over `Packed`, with BERT's own names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.packed import Packed


@dataclass(frozen=True)
class TransformerShape:
    width: int = 768
    heads: int = 12
    intermediate: int = 3072
    layers: int = 12
    dropout: float = 0.1
    positions: int = 512


class SelfAttention(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)

    def forward(self, x: Packed) -> Tensor:
        parts = [x.with_rows(layer(x.rows)).by_run() for layer in (self.query, self.key, self.value)]
        dropout = self.dropout if self.training else 0.0
        outputs = []
        for q, k, v in zip(*parts):
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs)


class ResidualOutput(nn.Module):
    def __init__(self, width: int, shape: TransformerShape) -> None:
        super().__init__()
        self.dense = nn.Linear(width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self = SelfAttention(shape)
        self.output = ResidualOutput(shape.width, shape)


class Intermediate(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.width, shape.intermediate)


class Layer(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.intermediate = Intermediate(shape)
        self.output = ResidualOutput(shape.intermediate, shape)

    def forward(self, x: Packed) -> Packed:
        rows = self.attention.output(self.attention.self(x), x.rows)
        return x.with_rows(self.output(F.gelu(self.intermediate.dense(rows)), rows))


class Embeddings(nn.Module):
    def __init__(self, shape: TransformerShape, vocabulary: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, shape.width)
        self.position_embeddings = nn.Embedding(shape.positions, shape.width)
        self.token_type_embeddings = nn.Embedding(2, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor) -> Tensor:
        x = tokens + self.position_embeddings(positions) + self.token_type_embeddings(token_types)
        return self.dropout(self.LayerNorm(x))


class Encoder(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(shape) for _ in range(shape.layers))


class Bert(nn.Module):
    def __init__(self, shape: TransformerShape, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape, vocabulary)
        self.encoder = Encoder(shape)
