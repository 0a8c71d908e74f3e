"""Captions in Karpathy's format, which COCO's and Flickr30k's usual splits are published in.

``dataset_coco.json`` and ``dataset_flickr30k.json`` are ``{"images": [...]}``, each image with ``filename``,
``split`` (train, restval, val or test) and ``sentences``, a list of ``{"raw": caption, ...}``; an image of
COCO has ``filepath``, its folder, too. Demonstrations give an image's first caption; as in OpenFlamingo's
evaluation, they come from ``train`` without ``restval``.
Source: https://cs.stanford.edu/people/karpathy/deepimagesent/
"""

from __future__ import annotations

from collections.abc import Callable

from .cuts import cut_caption
from .folder import DataFolder
from .rows import Row, rows_under
from .task import BEAMS, Example, Task

SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
MAX_NEW_TOKENS = 20


def caption_task(name: str, title: str, file: str, images: str, folder_of: Callable[[Row], str]) -> Task:
    """Return the task of one of the files.

    images: the image folders, for people to read. folder_of: row -> name of the folder that its image is in.
    """

    def read(folder: DataFolder, split: str) -> list[Example]:
        rows = [row for row in rows_under(folder.file(file), "images", SOURCE) if row.text("split") == split]
        return [_example(row, folder, folder_of(row)) for row in rows]

    return Task(
        name=name,
        title=title,
        source=SOURCE,
        files=(file, images),
        read=read,
        eval_split="test",
        train_split="train",
        chunk="Output:",
        chat="Provide a one-sentence caption for the provided image.",  # LLaVA-1.5's
        metrics=("cider_d",),
        cut=cut_caption,
        decoding={**BEAMS, "max_new_tokens": MAX_NEW_TOKENS},
    )


def _example(row: Row, folder: DataFolder, images: str) -> Example:
    name = row.text("filename")
    path = folder.directory(images, containing=name) / name
    captions = tuple(map(str.strip, row.texts("sentences", "raw")))
    return Example(row.where, (str(path),), "", captions)
