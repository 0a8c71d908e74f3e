"""The feature cache: the frozen tower's tokens of every image, computed once and stored on disk.

Workers look images up (`FeatureStore`, `lookup_frame`) and send what they found (`collate_frames`); the
training process encodes and stores what was missing (`FeatureCache.complete`).
"""

from .encoder import FeatureCache, open_feature_cache
from .pending import Frame, collate_frames, lookup_frame
from .store import FeatureStore, FeatureWriter

__all__ = [
    "FeatureStore",
    "FeatureWriter",
    "Frame",
    "FeatureCache",
    "lookup_frame",
    "open_feature_cache",
    "collate_frames",
]
