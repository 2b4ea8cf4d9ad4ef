"""CE and MoEE: a clip as several frozen features, a text as word vectors of a frozen encoder (arXiv 1907.13487).

The released models take zero-padded sequences and count the zeros (`masked` off); new ones take sequences as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from videoclip.errors import InputError
from videoclip.packed import Packed
from videoclip.parts.experts import ExpertTowers, NetVLAD, weighted_similarities
from videoclip.pretrained import load_weights, read_config, save_model

RECIPE = "experts"  # in `config.json`


@dataclass(frozen=True)
class ExpertsConfig:
    """Shape of a model. Experts stand in the sorted order of their names, as in the release."""

    names: tuple[str, ...]
    """Empty for a released model, whose file does not say: any names are taken then, sorted."""
    widths: tuple[int, ...]
    """Of every expert; of one that is a sequence, after pooling: width of a row times clusters."""
    outputs: tuple[int, ...]
    """Width of the space in which an expert is compared with texts; all the same where `collaborative`."""
    pooled: tuple[tuple[str, int, int], ...]
    """Experts that are sequences: name, width of a row, clusters."""
    text_dimension: int
    text_clusters: int = 28
    text_ghosts: int = 1
    collaborative: bool = True
    """CE, where experts gate each other; else MoEE."""
    masked: bool = True
    """Whether sequences are taken as they are. The release pads them with zeros, which count."""
    max_rows: int = 64
    """Rows of a sequence, of an expert or of words, that are looked at; to so many zeros are added if not `masked`."""

    def __post_init__(self) -> None:
        for name in ("names", "widths", "outputs"):  # lists, where they were read from json
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "pooled", tuple((str(name), *sizes) for name, *sizes in self.pooled))
        counts = {len(self.widths), len(self.outputs), *([len(self.names)] if self.names else [])}
        if len(counts) > 1 or not self.widths:
            raise InputError(f"names, widths and outputs of experts must be as many: {self.names}, {self.widths}")
        if list(self.names) != sorted(set(self.names)):
            raise InputError(f"names of experts must be sorted and different: {', '.join(self.names)}")
        if self.collaborative and (len(set(self.outputs)) > 1 or len(self.outputs) < 2):
            raise InputError("collaborative experts are two or more, in one width; MoEE takes one expert, or widths")

    @classmethod
    def of(
        cls,
        experts: Mapping[str, int],
        text_dimension: int,
        clusters: Mapping[str, int] | None = None,
        width: int = 768,
        text_clusters: int = 28,
        text_ghosts: int = 1,
        collaborative: bool = True,
    ) -> ExpertsConfig:
        """A new model's, for experts of these widths; `clusters` of those that are sequences.

        Without `collaborative` an expert's space is as wide as one of its rows, as in MoEE, and `width` says nothing.
        """
        clusters = clusters or {}
        names = tuple(sorted(experts))
        return cls(
            names,
            tuple(experts[name] * clusters.get(name, 1) for name in names),
            tuple(width if collaborative else experts[name] for name in names),
            tuple((name, experts[name], clusters[name]) for name in sorted(clusters)),
            text_dimension,
            text_clusters,
            text_ghosts,
            collaborative,
        )


class Experts(nn.Module):
    """Similarities of texts and clips over several experts."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.text_pooling = NetVLAD(config.text_dimension, config.text_clusters, config.text_ghosts)
        self.pooling = nn.ModuleDict({name: NetVLAD(width, clusters) for name, width, clusters in config.pooled})
        text_width = config.text_dimension * config.text_clusters
        self.ce = ExpertTowers(config.widths, config.outputs, text_width, config.collaborative)

    def similarities(
        self, experts: Mapping[str, Tensor | Packed], present: Mapping[str, Tensor], text: Tensor | Packed
    ) -> Tensor:
        """[captions, videos], between -1 and 1.

        `experts`: float [V, width] or, where an expert is a sequence, [V, n, d] with every row counted, or packed;
        `present`: bool or float [V], and where a name is left out its expert is always there; `text` [Q, w, d], every
        row counted, or packed. What stands in the place of a missing expert is not looked at.
        Raises InputError if names or widths are not the model's, or a video has no expert at all.
        """
        clips, there = self.embed_experts(experts, present)
        return weighted_similarities(*self.embed_words(text), clips, there)

    def embed_experts(
        self, experts: Mapping[str, Tensor | Packed], present: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Clips as units side by side, zero where one is missing, [V, D], and which are there, float [V, M]."""
        names = self._check_names(experts)
        there = torch.stack([self._present(name, experts[name], present) for name in names], 1)
        if not there.sum(1).all():
            nothing = int((there.sum(1) == 0).nonzero()[0])
            raise InputError(f"video {nothing} of these {len(there)} has no expert at all; leave it out")
        inputs = [self._expert(m, name, experts[name], there[:, m]) for m, name in enumerate(names)]
        units = self.ce.clips(inputs, there)
        return torch.cat([unit * there[:, m : m + 1] for m, unit in enumerate(units)], 1), there

    def embed_words(self, text: Tensor | Packed) -> tuple[Tensor, Tensor]:
        """Texts as units side by side, each times its weight, [Q, D], and the weights of the experts, [Q, M]."""
        packed = self._sequences("the text", text, self.config.text_dimension)
        units, weights = self.ce.texts(self.text_pooling(packed))
        return torch.cat([unit * weights[:, m : m + 1] for m, unit in enumerate(units)], 1), weights

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors`."""
        save_model(Path(folder), self, self.config, RECIPE)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Experts:
        """Read a model from a folder, in evaluation mode.

        Raises InputError if there is none, or configuration and weights do not fit together.
        """
        model = cls(read_config(Path(folder), ExpertsConfig))
        load_weights(Path(folder), model)
        return model.eval()

    def _check_names(self, experts: Mapping[str, Tensor | Packed]) -> list[str]:
        names = sorted(experts)
        if len(names) != len(self.config.widths) or (self.config.names and tuple(names) != self.config.names):
            wanted = ", ".join(self.config.names) or f"{len(self.config.widths)} of them"
            raise InputError(f"this model takes the experts {wanted}, not {', '.join(names)}")
        if missing := sorted(set(self.pooling) - set(names)):
            raise InputError(f"this model also takes the experts {', '.join(missing)}, not {', '.join(names)} alone")
        return names

    def _present(self, name: str, expert: Tensor | Packed, present: Mapping[str, Tensor]) -> Tensor:
        device = self.ce.moe_fc.weight.device
        if name not in present:
            return torch.ones(len(expert), device=device)
        if len(present[name]) != len(expert):
            raise InputError(f"expert {name}: {len(expert)} videos, but {len(present[name])} are said to be there")
        return (present[name] > 0).to(device, torch.float32)

    def _expert(self, m: int, name: str, expert: Tensor | Packed, there: Tensor) -> Tensor:
        """[V, width]: what a clip's expert enters the towers as; zeros where it is missing."""
        what = f"expert {name}"
        if name in self.pooling:
            width = next(width for pooled, width, _ in self.config.pooled if pooled == name)
            one = self.pooling[name](self._sequences(what, expert, width, there > 0))
        elif isinstance(expert, Packed) or expert.ndim != 2:
            raise InputError(f"{what}: one row a clip is wanted, [videos, {self.config.widths[m]}]")
        else:
            one = torch.where(there[:, None] > 0, expert.to(there), 0)
        if one.shape[1] != self.config.widths[m]:
            raise InputError(f"{what}: {one.shape[1]} wide, but this model takes {self.config.widths[m]}")
        return self._finite(what, one)

    def _sequences(self, what: str, x: Tensor | Packed, width: int, there: Tensor | None = None) -> Packed:
        """The rows that count: all of a padded [B, n, d], zeroed where a sequence is missing; of a packed one those
        that are there, followed by zeros if the model knows no masks."""
        weight = self.ce.moe_fc.weight
        got = (x.rows if isinstance(x, Packed) else x).shape
        if len(got) != (2 if isinstance(x, Packed) else 3) or got[-1] != width:
            raise InputError(f"{what}: rows of shape {tuple(got)}, but this model takes rows {width} wide")
        if isinstance(x, Packed):
            kept = x.positions < self.config.max_rows
            kept = kept if there is None else kept & there.cpu()[x.owners]
            counts = torch.zeros_like(x.lengths).index_add_(0, x.owners, kept.long())
            packed = Packed(x.rows[kept.to(x.rows.device)].to(weight), counts)
            if self.config.masked:
                return packed.with_rows(self._finite(what, packed.rows))
            x, there = weight.new_zeros(len(x), self.config.max_rows, width), None
            x[torch.arange(self.config.max_rows) < counts[:, None]] = packed.rows
        x = x.to(weight)
        x = x if there is None else torch.where(there[:, None, None], x, 0)
        lengths = torch.full((len(x),), x.shape[1])
        return Packed(self._finite(what, x.flatten(0, 1)), lengths)

    def _finite(self, what: str, x: Tensor) -> Tensor:
        if not self.training and not torch.isfinite(x).all():
            raise InputError(f"{what}: holds values that are not finite where it is said to be there")
        return x
