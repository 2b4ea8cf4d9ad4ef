"""Similar videos: batches made of them, the index that finds them, figures about batches, and false negatives."""

from videoclip.retrieval.clustering import cluster_videos

__all__ = ["cluster_videos"]
