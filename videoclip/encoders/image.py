"""A Hugging Face vision model (CLIP, SigLIP, …) as a frozen encoder: one token a second, the mean of its frames.

Of a model with two towers the text side is kept: it is what the tokens can be asked with before anything is trained
(`recipes/towers.py`). Its weights and its tokenizer are part of the encoder's fingerprint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videoclip.data.video import FrameFormat
from videoclip.data.words import WordTokenizer
from videoclip.encoders.text_tower import TextTower, load_text_tokenizer, read_text_tokenizer
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.errors import InputError
from videoclip.packed import Packed

FRAMES_PER_SECOND = 2
HIDDEN = "+hidden"  # behind a hub id or folder: tokens hold the image side's hidden states too


class ImageEncoder(VideoEncoder):
    """Frames [B, 3, T, H, W] in [0, 1] -> [B, D], through the image side of a Hugging Face model.

    `options` hold the model's configuration and the mean, deviation and size of its preprocessing, so that a saved
    encoder needs neither hub nor folder. With `hidden` a token is the projected embedding, `projected` wide, followed
    by the mean of the image side's last hidden states. `words` is the tokenizer of a text side, whose fingerprint
    stands in the options as `tokenizer`; None for a model of images alone.
    """

    def __init__(
        self,
        configuration: dict[str, Any],
        mean: list[float],
        deviation: list[float],
        size: int,
        name: str,
        hidden: bool = False,
        tokenizer: str = "",
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.name = name
        self.options = {
            "configuration": configuration, "mean": mean, "deviation": deviation, "size": size, "name": name
        }  # fmt: skip
        if hidden:
            self.options["hidden"] = True
        if tokenizer:
            self.options["tokenizer"] = tokenizer
        self.hidden = hidden
        self.words: WordTokenizer | None = None
        self.frame_format = FrameFormat(FRAMES_PER_SECOND, size)
        self.frame_offsets = np.arange(FRAMES_PER_SECOND)
        values = {key: value for key, value in configuration.items() if key != "model_type"}
        self.network = AutoModel.from_config(AutoConfig.for_model(configuration["model_type"], **values))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)
        self.mean: Tensor
        self.deviation: Tensor
        self.requires_grad_(False).eval()
        with torch.inference_mode():
            projected, states = self._image_features(torch.zeros(1, 3, size, size))
        self.projected = projected.shape[1]
        self.dimension = self.projected + (states.shape[2] if hidden else 0)

    @classmethod
    def from_pretrained(cls, folder_or_id: str) -> ImageEncoder:
        """Read a model from a local folder or a hub id; `+hidden` behind it asks for hidden states too.

        Raises InputError if there is none, if it says nothing of how its images are to be prepared, or if its text
        side and its tokenizer do not belong together.
        """
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        name = str(folder_or_id).rstrip("/").split("/")[-1]
        hidden = folder_or_id.endswith(HIDDEN)
        folder_or_id = folder_or_id.removesuffix(HIDDEN)
        try:
            network = AutoModel.from_pretrained(folder_or_id)
            preparation, _ = ImageProcessingMixin.get_image_processor_dict(folder_or_id)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{folder_or_id}: no vision model that transformers can load ({reason})") from None
        if not hasattr(network, "get_image_features") and not hasattr(network.config, "image_size"):
            raise InputError(f"{folder_or_id}: not a vision model")
        size = _crop_size(preparation) or _size_of_patches(network.config)
        mean, deviation = preparation.get("image_mean"), preparation.get("image_std")
        if size is None or mean is None or deviation is None:
            raise InputError(f"{folder_or_id}: preprocessor_config.json lacks size, image_mean or image_std")
        configuration = network.config.to_dict()
        words = read_text_tokenizer(folder_or_id, network)
        identity = words.fingerprint() if words else ""
        encoder = cls(configuration, list(mean), list(deviation), size, name, hidden, identity)
        encoder.network.load_state_dict(network.state_dict())
        encoder.words = words
        return encoder

    def text_tower(self) -> TextTower:
        """The text side that belongs to the images. Raises InputError if there is none, or it is not one."""
        if self.words is None:
            reason = "came without tokenizer.json" if hasattr(self.network, "get_text_features") else "has no text side"
            raise InputError(f"the encoder {self.name} {reason}; extract with a model of pictures and texts")
        tower = TextTower(self.network, self.words)
        word = Packed(torch.tensor([self.words.cls_id, self.words.sep_id]), torch.tensor([2]))
        width = tower.encode(word)[0].shape[1]
        if width != self.projected:
            raise InputError(
                f"the encoder {self.name} embeds images {self.projected} wide and texts {width} wide: its two sides do "
                "not belong together"
            )
        return tower

    def save(self, folder: Path) -> None:
        """Write the encoder, and the tokenizer of its text side, into `folder`."""
        super().save(folder)
        if self.words is not None:
            self.words.save(folder)

    def read_beside(self, folder: Path) -> None:
        """Take the tokenizer that was saved with this encoder. Raises InputError if it is another, or missing."""
        if self.options.get("tokenizer"):
            self.words = load_text_tokenizer(Path(folder), self.options["tokenizer"], self.network)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, D]: the mean over frames."""
        batch, _, time, _, _ = frames.shape
        images = (frames.transpose(1, 2).flatten(0, 1) - self.mean) / self.deviation
        token, states = self._image_features(images)  # (B * T, projected), (B * T, patches, W)
        if self.hidden:
            token = torch.cat([token, states.mean(1)], 1)
        return token.unflatten(0, (batch, time)).mean(1)

    def _image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> the projected image embedding of a dual encoder, else the pooled output, [N, D]; and the
        last layer's hidden states [N, patches, W]."""
        network: Any = self.network
        inputs = {"pixel_values": images}
        if network.config.model_type == "siglip2":
            inputs = _as_patches(images, network.config.vision_config.patch_size)
        if hasattr(network, "get_image_features"):
            output = network.get_image_features(**inputs)
        elif hasattr(network, "get_video_features"):  # Perception Encoder: every picture a video of one frame
            output = network.get_video_features(pixel_values_videos=images[:, None])
        else:
            output = network(**inputs)
        if isinstance(output, Tensor):
            return output, (network.vision_model(**inputs).last_hidden_state if self.hidden else output[:, None])
        pooled = getattr(output, "pooler_output", None)
        states = output.last_hidden_state
        return (pooled if pooled is not None else states.mean(1)), states.flatten(2).flatten(1, -2)


def _as_patches(images: Tensor, patch: int) -> dict[str, Tensor]:
    """Pictures [N, 3, H, W] as SigLIP 2 takes them: patches [N, patches, patch * patch * 3], all of them there."""
    count, _, height, width = images.shape
    shape = torch.tensor([height // patch, width // patch], device=images.device)
    grid = images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (N, 3, rows, patch, columns, patch)
    patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=images.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shape.expand(count, 2)}


def _crop_size(preparation: dict[str, Any]) -> int | None:
    """Pixels of the square that the model looks at."""
    for key in ("crop_size", "size"):
        value = preparation.get(key)
        if isinstance(value, int):
            return value
        if isinstance(value, dict) and (found := value.get("height") or value.get("shortest_edge")):
            return int(found)
    return None


def _size_of_patches(configuration: Any) -> int | None:
    """Pixels of the square of as many patches as a model of any picture size (SigLIP 2) was trained with."""
    image = getattr(configuration, "vision_config", None)
    if configuration.model_type != "siglip2" or image is None:
        return None
    return round(image.num_patches**0.5) * image.patch_size
