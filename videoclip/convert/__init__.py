"""Public checkpoints and features in, ours out."""

from videoclip.convert.alpro import from_alpro
from videoclip.convert.bert import from_bert
from videoclip.convert.collaborative_experts import from_collaborative_experts
from videoclip.convert.efficient_prompt import from_efficient_prompt
from videoclip.convert.features import features_to_shards, fingerprint_of_features, shards_to_features
from videoclip.convert.mmpt import describe, from_mmpt

__all__ = [
    "describe",
    "features_to_shards",
    "fingerprint_of_features",
    "from_alpro",
    "from_bert",
    "from_collaborative_experts",
    "from_efficient_prompt",
    "from_mmpt",
    "shards_to_features",
]
