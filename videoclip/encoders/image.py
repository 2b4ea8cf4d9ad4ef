"""A Hugging Face vision model (CLIP, SigLIP, …) as a frozen encoder: one token a second, the mean of its frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from videoclip.data.video import FrameFormat
from videoclip.encoders.video_encoder import VideoEncoder
from videoclip.errors import InputError

FRAMES_PER_SECOND = 2


class ImageEncoder(VideoEncoder):
    """Frames [B, 3, T, H, W] in [0, 1] -> [B, D], through the image side of a Hugging Face model.

    `options` hold the model's configuration and the mean, deviation and size of its preprocessing, so that a saved
    encoder needs neither hub nor folder.
    """

    def __init__(
        self, configuration: dict[str, Any], mean: list[float], deviation: list[float], size: int, name: str
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.name = name
        self.options = {
            "configuration": configuration, "mean": mean, "deviation": deviation, "size": size, "name": name
        }  # fmt: skip
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
            self.dimension = self._image_features(torch.zeros(1, 3, size, size)).shape[1]

    @classmethod
    def from_pretrained(cls, folder_or_id: str) -> ImageEncoder:
        """Read a model from a local folder or a hub id.

        Raises InputError if there is none, or if it says nothing of how its images are to be prepared.
        """
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            network = AutoModel.from_pretrained(folder_or_id)
            preparation, _ = ImageProcessingMixin.get_image_processor_dict(folder_or_id)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{folder_or_id}: no vision model that transformers can load ({reason})") from None
        if not hasattr(network, "get_image_features") and not hasattr(network.config, "image_size"):
            raise InputError(f"{folder_or_id}: not a vision model")
        size = _crop_size(preparation)
        mean, deviation = preparation.get("image_mean"), preparation.get("image_std")
        if size is None or mean is None or deviation is None:
            raise InputError(f"{folder_or_id}: preprocessor_config.json lacks size, image_mean or image_std")
        configuration = network.config.to_dict()
        encoder = cls(configuration, list(mean), list(deviation), size, str(folder_or_id).rstrip("/").split("/")[-1])
        encoder.network.load_state_dict(network.state_dict())
        return encoder

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] in [0, 1] -> [B, D]: the mean over frames."""
        batch, _, time, _, _ = frames.shape
        images = (frames.transpose(1, 2).flatten(0, 1) - self.mean) / self.deviation
        return self._image_features(images).unflatten(0, (batch, time)).mean(1)

    def _image_features(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D]: the projected image embedding of a dual encoder, else the pooled output."""
        network: Any = self.network
        if hasattr(network, "get_image_features"):
            output = network.get_image_features(pixel_values=images)
        else:
            output = network(pixel_values=images)
        if isinstance(output, Tensor):
            return output
        pooled = getattr(output, "pooler_output", None)
        return pooled if pooled is not None else output.last_hidden_state.mean(1)


def _crop_size(preparation: dict[str, Any]) -> int | None:
    """Pixels of the square that the model looks at."""
    for key in ("crop_size", "size"):
        value = preparation.get(key)
        if isinstance(value, int):
            return value
        if isinstance(value, dict) and (found := value.get("height") or value.get("shortest_edge")):
            return int(found)
    return None
