"""Similar videos: batches made of them, the index that finds them, figures about batches, and false negatives."""

from videoclip.retrieval.clustering import cluster_videos
from videoclip.retrieval.epochs import BatchOptions, Clustering, make_clustering

__all__ = ["BatchOptions", "Clustering", "cluster_videos", "make_clustering"]
