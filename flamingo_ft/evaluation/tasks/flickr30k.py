"""Flickr30k captions, Karpathy's split: `dataset_flickr30k.json`, images in `flickr30k-images`.

See `karpathy` for the format. Images: https://shannon.cs.illinois.edu/DenotationGraph/
"""

from .karpathy import caption_task

TASK = caption_task(
    name="flickr30k",
    title="Flickr30k captions (Karpathy test)",
    file="dataset_flickr30k.json",
    images="flickr30k-images/",
    folder_of=lambda row: "flickr30k-images",
)
