"""The embedded corpus: a made-up cooking channel, generated from a seed, with annotations in the public formats.

Long videos show recipes of several steps. A step is an action (a motion) on an ingredient (shape and colour) in a
vessel at a place (the background). Two actions always share every single frame and differ in the order of the
frames alone, so no still picture tells them apart. A narrator talks about the steps as speech recognition would
write it down: rolling lines that repeat their predecessor, filler, synonyms, lines about something else, and
leads and lags of seconds. Held-out captions are phrased differently from anything the narrator says.

Files written, below one folder:

    train/videos/*.mp4  test/videos/*.mp4       H.264, 64 x 64 pixels, 8 frames a second
    train/raw_caption.json  test/…              HowTo100M: {video_id: {start, end, text}}; the test videos' narration
                                                is for searching them, never for training
    train/HowTo100M_v1.csv                      HowTo100M: video_id, category_1, category_2, rank, task_id
    youcookii_annotations_trainval.json         YouCook2: steps of both splits, with sentences
    qvhighlights_train.jsonl  …_val.jsonl       QVHighlights: queries, windows, saliency by three raters
"""

from videoclip.synthetic.kitchen.annotations import caption, write_annotations
from videoclip.synthetic.kitchen.narration import Phrase, narrate, narrate_phrases, steps_of_captions
from videoclip.synthetic.kitchen.pictures import draw_seconds, render_video
from videoclip.synthetic.kitchen.plan import KitchenConfig, KitchenVideo, Step, plan_kitchen

__all__ = [
    "KitchenConfig",
    "KitchenVideo",
    "Phrase",
    "Step",
    "caption",
    "draw_seconds",
    "narrate",
    "narrate_phrases",
    "plan_kitchen",
    "render_video",
    "steps_of_captions",
    "write_annotations",
]
