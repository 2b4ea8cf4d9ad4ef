"""What each recipe of the table is, in a few words: for `videoclip recipes`. docs/systems.md says it at length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """`needs`: what it is trained from. `approximate`: where it is not what was published, and why."""

    paper: str
    needs: str
    approximate: str


ABOUT: dict[str, About] = {
    "videoclip": About(
        "VideoCLIP (Xu et al., EMNLP 2021)",
        "shards of tokens with captions",
        "nothing in the model; batches are an exact cover unless --batches paper",
    ),
    "margin": About(
        "HowTo100M's max-margin loss (Miech et al., ICCV 2019)",
        "shards of tokens with captions",
        "the loss alone is theirs; the towers are VideoCLIP's",
    ),
    "fusion": About(
        "after ALPRO (Li et al., CVPR 2022), on tokens",
        "shards of tokens with captions; a vocabulary with [MASK]",
        "no published system is exactly this: VideoCLIP's towers under ALPRO's fusion, matching and masked words",
    ),
    "frozen-in-time": About(
        "Frozen in Time (Bain et al., ICCV 2021)",
        "shards of frames: --encoder pixels-64, or extract frames",
        "the text tower is a BERT of six layers, not DistilBERT's file",
    ),
    "alpro": About(
        "ALPRO, Align and Prompt (Li et al., CVPR 2022)",
        "shards of frames; for pem a prompter (--model.losses vtc) and a list of entities",
        "negatives of all workers, not a worker's own; entities from a list, not from a tagger",
    ),
    "prompting": About(
        "Efficient-Prompt (Ju et al., ECCV 2022)",
        "shards of a frozen dual encoder's own tokens, and that encoder",
        "nothing in the model",
    ),
    "towers": About(
        "ours: frozen towers and a small addition",
        "shards of a two-tower model of pictures",
        "no published system is exactly this",
    ),
    "alignment": About(
        "TAN, the temporal alignment network (Han, Xie, Zisserman, CVPR 2022)",
        "shards of tokens with captions, times as they were spoken",
        "towers are VideoCLIP's; labels of co-training come from the model as it is, not from its running average",
    ),
}
