"""S3D (gated, space-to-depth) as MIL-NCE published it for HowTo100M, the frozen video encoder of VideoCLIP.

Module and parameter names are those of the public state dict, which loads without a map. What runs is a copy
in a faster arrangement (`folding.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videoclip.data.video import FrameFormat
from videoclip.encoders.folding import FoldedCopy
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.encoders.weights import load_checked, read_tensors
from videoclip.errors import InputError

TEXT_WORDS = 16  # words of a sentence that the published text module looks at
VOCABULARY = 66250


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and ReLU: once, or twice (space, then time) where `separable`.

    `crop` drops the first index of time, height and width, as the published first layer does.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int, int],
        padding: tuple[int, int, int] = (0, 0, 0),
        separable: bool = False,
        crop: bool = False,
    ) -> None:
        super().__init__()
        self.crop = crop
        first, first_padding = kernel, padding
        if separable:
            first, first_padding = (1, *kernel[1:]), (0, *padding[1:])
            self.conv2 = nn.Conv3d(outputs, outputs, (kernel[0], 1, 1), padding=(padding[0], 0, 0), bias=False)
            self.bn2 = nn.BatchNorm3d(outputs)
        self.separable = separable
        self.conv1 = nn.Conv3d(inputs, outputs, first, padding=first_padding, bias=False)
        self.bn1 = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.separable:
            x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return x[:, :, 1:, 1:, 1:] if self.crop else x


class SelfGating(nn.Module):
    """Scale every channel by a sigmoid of a linear map of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3, 4))))[:, :, None, None, None]


class InceptionBlock(nn.Module):
    """Four gated branches side by side: 1x1x1, two separable 3x3x3, and a pooled 1x1x1."""

    def __init__(self, inputs: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int) -> None:
        super().__init__()
        one, three, same = (1, 1, 1), (3, 3, 3), (1, 1, 1)
        self.conv_b0 = ConvNorm(inputs, b0, one)
        self.conv_b1_a = ConvNorm(inputs, b1a, one)
        self.conv_b1_b = ConvNorm(b1a, b1b, three, same, separable=True)
        self.conv_b2_a = ConvNorm(inputs, b2a, one)
        self.conv_b2_b = ConvNorm(b2a, b2b, three, same, separable=True)
        self.maxpool_b3 = nn.MaxPool3d(3, stride=1, padding=1)
        self.conv_b3_b = ConvNorm(inputs, b3b, one)
        self.gating_b0, self.gating_b1 = SelfGating(b0), SelfGating(b1b)
        self.gating_b2, self.gating_b3 = SelfGating(b2b), SelfGating(b3b)
        self.outputs = b0 + b1b + b2b + b3b

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, T, H, W] -> [B, outputs, T, H, W]: the four gated branches, joined."""
        branches = (
            self.gating_b0(self.conv_b0(x)),
            self.gating_b1(self.conv_b1_b(self.conv_b1_a(x))),
            self.gating_b2(self.conv_b2_b(self.conv_b2_a(x))),
            self.gating_b3(self.conv_b3_b(self.maxpool_b3(x))),
        )
        return torch.cat(branches, 1)


class SamePool(nn.Module):
    """Max pooling with TensorFlow's SAME padding: zeros, split low and high, before an unpadded pool.

    Everything pooled has passed a ReLU, so that zeros never win over a real maximum.
    """

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        along = [max(k - s, 0) for k, s in zip(kernel, stride)]
        self.padding = [side for total in reversed(along) for side in (total // 2, total - total // 2)]
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding)
        return F.max_pool3d(x, self.kernel, self.stride, ceil_mode=True)


class SentenceEmbedding(nn.Module):
    """The text module of the same release: word embeddings, a wide layer, the maximum over words, a linear map."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.word_embd = nn.Embedding(VOCABULARY, 300)
        self.fc1 = nn.Linear(300, 2048)
        self.fc2 = nn.Linear(2048, dimension)

    def forward(self, words: Tensor) -> Tensor:
        """int64 [N, 16], 0 where there is no word -> [N, dimension]. Padding joins in the maximum, as published."""
        return self.fc2(F.relu(self.fc1(self.word_embd(words))).amax(1))


class S3D(VideoEncoder):
    """Frozen S3D: frames [B, 3, T, H, W] in [0, 1] (T even, H and W multiples of 16) -> [B, 512].

    Its token of a second is the unit vector of the embedding of 30 frames of 224 x 224, as VideoCLIP's features are.
    """

    def __init__(self, text: bool = False) -> None:
        super().__init__()
        self.name, self.options = "s3d", {"text": text}
        self.dimension = 512
        self.frame_format = FrameFormat(30, 224)
        self.frame_offsets = np.arange(30)
        self.words: dict[str, int] = {}
        self._folded = FoldedCopy()
        self.conv1 = ConvNorm(24, 64, (2, 4, 4), (1, 2, 2), crop=True)
        self.maxpool_2a = SamePool((1, 3, 3), (1, 2, 2))
        self.conv_2b = ConvNorm(64, 64, (1, 1, 1))
        self.conv_2c = ConvNorm(64, 192, (3, 3, 3), (1, 1, 1), separable=True)
        self.gating = SelfGating(192)
        self.maxpool_3a = SamePool((1, 3, 3), (1, 2, 2))
        self.mixed_3b = InceptionBlock(192, 64, 96, 128, 16, 32, 32)
        self.mixed_3c = InceptionBlock(256, 128, 128, 192, 32, 96, 64)
        self.maxpool_4a = SamePool((3, 3, 3), (2, 2, 2))
        self.mixed_4b = InceptionBlock(480, 192, 96, 208, 16, 48, 64)
        self.mixed_4c = InceptionBlock(512, 160, 112, 224, 24, 64, 64)
        self.mixed_4d = InceptionBlock(512, 128, 128, 256, 24, 64, 64)
        self.mixed_4e = InceptionBlock(512, 112, 144, 288, 32, 64, 64)
        self.mixed_4f = InceptionBlock(528, 256, 160, 320, 32, 128, 128)
        self.maxpool_5a = SamePool((2, 2, 2), (2, 2, 2))
        self.mixed_5b = InceptionBlock(832, 256, 160, 320, 32, 128, 128)
        self.mixed_5c = InceptionBlock(832, 384, 192, 384, 48, 128, 128)
        self.fc = nn.Linear(1024, self.dimension)
        self.text_module = SentenceEmbedding(self.dimension) if text else None
        self.requires_grad_(False).eval()

    @classmethod
    def from_howto100m(cls, path: Path | str, dictionary: Path | str | None = None) -> S3D:
        """Read `s3d_howto100m.pth`; with `dictionary` (`s3d_dict.npy`) also its text module, for `encode_text`.

        Raises InputError if the file is missing, truncated, holds more than tensors or another network, or if the
        dictionary does not fit the word embeddings.
        """
        encoder = cls(text=dictionary is not None)
        state = read_tensors(Path(path))
        if dictionary is None:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("text_module.")}
        load_checked(encoder, state, Path(path))
        if dictionary is not None:
            encoder.words = _read_dictionary(Path(dictionary))
        return encoder

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> video embedding [B, 512], not normalised."""
        return self.fc(self.mixed_5c_features(frames))

    def mixed_5c_features(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, 1024]: the last block's output, averaged over time and space.

        Raises InputError if the frames have another shape than the network takes.
        """
        _, channels, time, height, width = frames.shape
        if channels != 3 or time % 2 or height % 16 or width % 16:
            raise InputError(
                f"S3D takes [B, 3, T, H, W] with T even and H, W multiples of 16, not {tuple(frames.shape)}"
            )
        return (self if self.training else self._folded.of(self)).blocks(frames)

    def blocks(self, frames: Tensor) -> Tensor:
        """The network as it stands, without looking for a faster arrangement of it."""
        x = self.maxpool_2a(self.conv1(space_to_depth(frames)))
        x = self.maxpool_3a(self.gating(self.conv_2c(self.conv_2b(x))))
        x = self.maxpool_4a(self.mixed_3c(self.mixed_3b(x)))
        x = self.mixed_4f(self.mixed_4e(self.mixed_4d(self.mixed_4c(self.mixed_4b(x)))))
        return self.mixed_5c(self.mixed_5b(self.maxpool_5a(x))).mean((2, 3, 4))

    def tokens(self, frames: Tensor) -> Tensor:
        """The published features: unit vectors [B, 512]."""
        return F.normalize(self(frames), dim=1)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> [N, 512], in the space of `forward`'s embeddings (not normalised).

        Raises InputError if the encoder was made without its dictionary.
        """
        if self.text_module is None or not self.words:
            raise InputError("this S3D has no text side; give from_howto100m the dictionary s3d_dict.npy")
        rows = torch.zeros(len(texts), TEXT_WORDS, dtype=torch.int64)
        for row, text in zip(rows, texts):
            known = [self.words[word] for word in re.findall(r"[\w']+", text.lower()) if word in self.words]
            row[: len(known[:TEXT_WORDS])] = torch.tensor(known[:TEXT_WORDS], dtype=torch.int64)
        return self.text_module(rows.to(self.fc.weight.device))


def space_to_depth(frames: Tensor) -> Tensor:
    """Fold 2 x 2 x 2 blocks into channels, in the order (t, h, w, channel): [B, 3, T, H, W] -> [B, 24, T/2, H/2, W/2].

    The result is in channels-last order, which is what one copy of the permuted view gives.
    """
    b, c, t, h, w = frames.shape
    x = frames.view(b, c, t // 2, 2, h // 2, 2, w // 2, 2)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, t // 2, h // 2, w // 2, 8 * c)
    return x.permute(0, 4, 1, 2, 3)


def _read_dictionary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise InputError(f"{path}: no such dictionary")
    try:
        words = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not an array of words that can be read safely ({error})") from None
    if words.ndim != 1 or words.dtype.kind not in "US":
        raise InputError(f"{path}: expected a list of words, found {words.dtype} {words.shape}")
    if len(words) + 1 > VOCABULARY:
        raise InputError(f"{path}: {len(words)} words do not fit an embedding table of {VOCABULARY} (with padding)")
    return {str(word): number for number, word in enumerate(words, 1)}  # 0 is padding
