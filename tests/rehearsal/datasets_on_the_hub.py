"""Two datasets as their repositories have them, with drawn images.

VQA-RAD is Parquet with embedded images, LLaVA-Instruct-150K lists of conversations that name COCO's images.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageDraw

LLAVA, VQA_RAD = "liuhaotian/LLaVA-Instruct-150K", "flaviagiammarino/vqa-rad"
COLORS = ("red", "green", "blue", "white")
QUESTION = "what color is the field?"


def write_vqa_rad(folder: Path) -> Path:
    """Questions with embedded images, in one Parquet file for each split."""
    (folder / "data").mkdir(parents=True)
    splits = {
        "train-00000-of-00001-eb8844602202be60": range(12),
        "test-00000-of-00001-e5bc3d208bb4deeb": range(12, 16),
    }
    for file, indices in splits.items():
        rows = [_question(index) for index in indices]
        features = datasets.Features(
            image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
        )
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(str(folder / "data" / f"{file}.parquet"))
    write_card(folder, "cc0-1.0")
    return folder


def _question(index: int) -> dict[str, Any]:
    content = io.BytesIO()
    draw(index, (48, 48)).save(content, "JPEG")
    image = {"bytes": content.getvalue(), "path": None}
    return {"image": image, "question": QUESTION, "answer": COLORS[index % len(COLORS)]}


def write_llava(folder: Path) -> Path:
    """Lists of conversations that name COCO's images; the largest also has rows of text and other folders."""
    folder.mkdir(parents=True)
    rows = [_conversation(index) for index in range(12)]
    for file in ("complex_reasoning_77k", "conversation_58k", "detail_23k"):
        (folder / f"{file}.json").write_text(json.dumps(rows[:3]))
    (folder / "llava_instruct_150k.json").write_text(json.dumps(rows))
    (folder / "llava_instruct_80k.json").write_text(json.dumps(rows[:8]))
    text = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]
    mixture = [
        *({**row, "image": f"coco/train2017/{row['image']}"} for row in rows),
        {"id": "wgByO4Y_0", "model": "", "conversations": text},
    ]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(mixture))
    write_card(folder, "cc-by-4.0")
    return folder


def _conversation(index: int) -> dict[str, Any]:
    color = COLORS[index % len(COLORS)]
    image_first = index % 2 == 0  # both orders occur
    question = "What is the color of the field?"
    first = f"<image>\n{question}" if image_first else f"{question}\n<image>"
    turns = [first, color, "Is there a square?", "yes"]
    speakers = ("human", "gpt") * 2
    conversation = [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=True)]
    name = coco_name(index)
    return {"id": name.removesuffix(".jpg"), "image": name, "conversations": conversation}


# --- Images


def write_coco(folder: Path, count: int = 12) -> Path:
    """Write the images that LLaVA's rows name, as COCO's train2017 has them."""
    folder.mkdir(parents=True)
    for index in range(count):
        draw(index, (64, 48)).save(folder / coco_name(index))
    return folder


def coco_name(index: int) -> str:
    return f"{33471 + 7 * index:012}.jpg"


def draw(index: int, size: tuple[int, int]) -> Image.Image:
    """Return a field of a color with a black square whose place depends on the index."""
    image = Image.new("RGB", size, COLORS[index % len(COLORS)])
    corner = 3 * index % (size[1] - 8)
    ImageDraw.Draw(image).rectangle((corner, corner, corner + 8, corner + 8), fill="black")
    return image


def write_card(folder: Path, license: str | None) -> None:
    stated = f"license: {license}\n" if license else ""
    (folder / "README.md").write_text(f"---\nlanguage: en\n{stated}---\n# {folder.name}\n")
    (folder / ".gitattributes").write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n")
