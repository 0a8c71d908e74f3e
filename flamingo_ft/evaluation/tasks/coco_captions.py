"""COCO captions, Karpathy's split: `dataset_coco.json`, images in `train2014` and `val2014`.

See `karpathy` for the format. Images: https://cocodataset.org/#download
"""

from .karpathy import caption_task

TASK = caption_task(
    name="coco",
    title="COCO captions (Karpathy test)",
    file="dataset_coco.json",
    images="train2014/, val2014/",
    folder_of=lambda row: row.text("filepath"),
)
