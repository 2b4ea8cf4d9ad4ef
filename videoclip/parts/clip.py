"""CLIP's transformer and its two sides, by OpenAI's names: pre-norm blocks, words' vectors in, embeddings out.

`transformer.py` is BERT's: post-norm, in both directions. Here LayerNorm stands before attention and feed-forward,
query, key and value are one matrix, and words look back only. The text side is taken apart where its words have been
looked up, so that vectors which are no word can stand among them and be trained through it (`parts/prompts.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.packed import Packed

HEAD_WIDTH = 64  # of every published CLIP; heads cannot be read off the tensors
Activation = Literal["quick_gelu", "gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation; models trained elsewhere have the exact one."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention inside each sequence; one matrix for query, key and value."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Packed) -> Tensor:
        """Rows [N, W] -> [N, W]."""
        projected = F.linear(x.rows, self.in_proj_weight, self.in_proj_bias)  # (N, 3 W)
        outputs = []
        for run in x.with_rows(projected).by_run():  # (count, length, 3 W)
            query, key, value = run.unflatten(2, (3, self.heads, -1)).permute(
                2, 0, 3, 1, 4
            )  # (count, heads, length, d)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))  # (count * length, W)
        return self.out_proj(torch.cat(outputs))

    def at_ends(self, x: Packed, ends: Tensor) -> Tensor:
        """The same for the last row of each sequence alone, [B, W]: it sees all others, masked or not."""
        width = x.rows.shape[1]
        query = F.linear(x.rows[ends], self.in_proj_weight[:width], self.in_proj_bias[:width])  # (B, W)
        rest = F.linear(x.rows, self.in_proj_weight[width:], self.in_proj_bias[width:])  # (N, 2 W)
        outputs = []
        for q, run in zip(query.split([count for count, _ in x.runs]), x.with_rows(rest).by_run()):
            key, value = run.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q.unflatten(1, (self.heads, 1, -1)), key, value)
            outputs.append(attended.flatten(1))  # (count, W)
        return self.out_proj(torch.cat(outputs))


class FeedForward(nn.Module):
    """Four times as wide inside."""

    def __init__(self, width: int, intermediate: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, intermediate)
        self.c_proj = nn.Linear(intermediate, width)
        self.activation = quick_gelu if activation == "quick_gelu" else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        """[…, W] -> […, W]."""
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then + feed-forward(norm(x))."""

    def __init__(self, width: int, heads: int, intermediate: int, causal: bool, activation: Activation) -> None:
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, intermediate, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Packed) -> Packed:
        """Rows [N, W] of sequences -> the same sequences."""
        rows = x.rows + self.attn(x.with_rows(self.ln_1(x.rows)))
        return x.with_rows(rows + self.mlp(self.ln_2(rows)))

    def at_ends(self, x: Packed, ends: Tensor) -> Tensor:
        """The outputs at the rows `ends`, int64 [B], the last of each sequence: [B, W]."""
        rows = x.rows[ends] + self.attn.at_ends(x.with_rows(self.ln_1(x.rows)), ends)
        return rows + self.mlp(self.ln_2(rows))


class Transformer(nn.Module):
    """A stack of blocks over rows [N, W]; the feed-forward layers are `intermediate` wide, 0: four times the width."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        causal: bool = False,
        intermediate: int = 0,
        activation: Activation = "quick_gelu",
    ) -> None:
        super().__init__()
        wide = intermediate or 4 * width
        self.resblocks = nn.ModuleList(Block(width, heads, wide, causal, activation) for _ in range(layers))

    def forward(self, x: Packed) -> Packed:
        """Rows [N, W] of sequences -> the same sequences."""
        for block in self.resblocks:
            x = block(x)
        return x

    def at_ends(self, x: Packed) -> Tensor:
        """The outputs at the last row of each sequence alone, [B, W]; the last block computes no others."""
        ends = (x.starts + x.lengths - 1).to(x.rows.device)
        for block in self.resblocks[:-1]:
            x = block(x)
        last = self.resblocks[-1]
        assert isinstance(last, Block)
        return last.at_ends(x, ends)


@dataclass(frozen=True)
class ClipConfig:
    """Size of a CLIP. The defaults are ViT-B/16."""

    dimension: int = 512
    """Of the common space."""
    width: int = 512
    """Of the text side, as layers, heads, intermediate (of the feed-forward layers), positions and vocabulary are."""
    layers: int = 12
    heads: int = 8
    intermediate: int = 2048
    positions: int = 77
    vocabulary: int = 49408
    image_width: int = 768
    """0: no image side, for a text side alone."""
    image_layers: int = 12
    image_heads: int = 12
    image_intermediate: int = 3072
    patch: int = 16
    grid: int = 14
    """Patches along each side of a picture."""
    activation: Activation = "quick_gelu"


class ImageSide(nn.Module):
    """Square pictures, prepared as CLIP wants them, to embeddings of the common space."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.image_width
        self.config = config
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.image_layers, config.image_heads, False, config.image_intermediate, config.activation
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, config.dimension))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, dimension]. Raises InputError for another size than the model's."""
        size = self.config.grid * self.config.patch
        if images.shape[2:] != (size, size):
            raise InputError(f"pictures of {tuple(images.shape[2:])} pixels; this CLIP takes {size} x {size}")
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (N, grid^2, W)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        count, length = x.shape[:2]
        outputs = self.transformer(Packed(x.flatten(0, 1), torch.full((count,), length))).rows
        return self.ln_post(outputs.unflatten(0, (count, length))[:, 0]) @ self.proj


class Clip(nn.Module):
    """Both sides of a CLIP; `visual` is None where only the text side is there."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positional_embedding = nn.Parameter(torch.zeros(config.positions, config.width))
        self.transformer = Transformer(
            config.width, config.layers, config.heads, True, config.intermediate, config.activation
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.zeros(config.width, config.dimension))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.visual = ImageSide(config) if config.image_width else None

    @property
    def word_width(self) -> int:
        """Width of a word's vector."""
        return self.config.width

    @property
    def word_positions(self) -> int:
        """Most vectors of one text, the start and end words among them."""
        return self.config.positions

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self.config.dimension

    def word_vectors(self, word_ids: Packed) -> Packed:
        """Ids, rows int [N] -> what the words are looked up as, rows [N, W]. Raises InputError for unknown ids."""
        rows = word_ids.rows.to(self.positional_embedding.device, torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.config.vocabulary:
            raise InputError(f"word ids must lie in this CLIP's vocabulary of {self.config.vocabulary}")
        return word_ids.with_rows(self.token_embedding(rows))

    def embed_word_vectors(self, vectors: Packed) -> Tensor:
        """Vectors of B texts, start and end word included, rows [N, W] -> [B, dimension], not of unit length.

        The end word's output is the text's, and words look back only: nothing behind the end has to be computed.
        Raises InputError if a text has more vectors than there are positions.
        """
        longest = int(vectors.lengths.max()) if len(vectors) else 0
        if longest > self.config.positions:
            raise InputError(f"a text of {longest} words and prompts; this CLIP has {self.config.positions} positions")
        x, order = vectors.by_length()
        x = x.with_rows(x.rows + self.positional_embedding[x.positions.to(x.rows.device)])
        ends = self.transformer.at_ends(x)  # (B, W)
        embedded = self.ln_final(ends) @ self.text_projection
        return embedded[torch.argsort(order).to(embedded.device)]

    def embed_images(self, images: Tensor) -> Tensor:
        """Prepared pictures [N, 3, H, W] -> [N, dimension]. Raises InputError if there is no image side."""
        if self.visual is None:
            raise InputError("this CLIP has its text side alone; give a whole model to embed pictures")
        return self.visual(images)


def read_clip_config(
    state: Mapping[str, Tensor], heads: tuple[int, int] = (0, 0), activation: Activation = "quick_gelu"
) -> ClipConfig:
    """The sizes of a CLIP from its tensors by OpenAI's names. `heads` of text and image side, 0: one for 64 columns.

    Raises KeyError, with the name, if one that says something is missing.
    """
    positions, width = state["positional_embedding"].shape
    image: dict[str, Any] = {"image_width": 0, "image_layers": 0, "image_heads": 1, "image_intermediate": 0}
    if "visual.conv1.weight" in state:
        image_width, _, patch, _ = state["visual.conv1.weight"].shape
        image = {
            "image_width": image_width,
            "image_layers": count_layers(state, "visual.transformer."),
            "image_heads": heads[1] or max(1, image_width // HEAD_WIDTH),
            "image_intermediate": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
            "patch": patch,
            "grid": round((len(state["visual.positional_embedding"]) - 1) ** 0.5),
        }
    return ClipConfig(
        dimension=state["text_projection"].shape[1],
        width=width,
        layers=count_layers(state, "transformer."),
        heads=heads[0] or max(1, width // HEAD_WIDTH),
        intermediate=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        positions=positions,
        vocabulary=len(state["token_embedding.weight"]),
        activation=activation,
        **image,
    )


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many blocks are stored below `<prefix>resblocks.`."""
    start = f"{prefix}resblocks."
    numbers = [name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def describe_clip(config: ClipConfig) -> dict[str, Any]:
    """The sizes as JSON values."""
    return asdict(config)
