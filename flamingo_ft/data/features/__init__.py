"""The frozen tower's tokens of every image, computed once and kept on disk.

Workers look images up (`FeatureStore`, `find_frame`) and send along what they found (`pending_media`); the training
process encodes and keeps what was missing (`FrozenFeatures.complete`).
"""

from .encoder import FrozenFeatures, open_features
from .pending import Frame, find_frame, pending_media
from .store import FeatureStore
from .writer import FeatureWriter

__all__ = [
    "FeatureStore",
    "FeatureWriter",
    "Frame",
    "FrozenFeatures",
    "find_frame",
    "open_features",
    "pending_media",
]
