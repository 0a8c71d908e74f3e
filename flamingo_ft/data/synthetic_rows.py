"""Synthetic rows of a schema, in place of data that is not on this machine: for trial runs.

Each row asks which colour a drawn square has, so that it has whatever its schema may have: an image, a
question, answers. Columns have the names that the source gives them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

from PIL import Image

from flamingo_ft.config import DataSource
from flamingo_ft.data.fields import Row
from flamingo_ft.data.schemas.mimicit import IMAGES_FILE
from flamingo_ft.data.schemas.schema import SCHEMAS
from flamingo_ft.errors import UserError

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
QUESTION = "Which colour is this?"
ROWS = 16  # enough for data.eval_fraction

# What trains on rows of their own; other methods read dialogues.
METHOD_SCHEMAS = {"dpo": "preference", "kto": "unpaired_preference"}


def write_synthetic_rows(source: DataSource, folder: Path, method: str = "sft") -> DataSource:
    """Write rows and images to ``folder`` and return the source that reads them as ``source`` is read.

    method: `train.method`, which decides about the schema if neither ``format`` nor ``columns`` does. Raises
    UserError for a schema that is not the package's own.
    """
    folder.mkdir(parents=True)
    schema = _schema_of(source, method)
    write = _write_mimicit if schema == "mimicit" else _write_jsonl
    options = {key: value for key, value in source.columns.items() if key != IMAGES_FILE}
    path = write(schema, options, folder)
    here = {"path": path, "hub": None, "config": None, "data_files": None, "revision": None, "split": "train"}
    return source.model_copy(
        update={**here, "format": schema, "columns": options, "image_root": None, "limit": None}
    )


def _schema_of(source: DataSource, method: str) -> str:
    if source.format != "auto":
        if source.format not in ROW_MAKERS and source.format != "mimicit":
            raise UserError(
                f"format {source.format}: registered outside the package, without synthetic rows; "
                "put a few rows of your own in the place of the data"
            )
        return source.format
    fitting = (name for name in ROW_MAKERS if source.columns and {*source.columns} <= {*_fields(name)})
    return METHOD_SCHEMAS.get(method) or next(fitting, "messages")


def _fields(schema: str) -> tuple[str, ...]:
    return (*SCHEMAS[schema].fields, "image", "images", "task")


def _write_jsonl(schema: str, columns: dict[str, str], folder: Path) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(ROWS):
            name = f"{index}.png"
            _picture(index, folder).save(folder / name)
            row = ROW_MAKERS[schema](index, name)
            file.write(json.dumps({columns.get(field, field): value for field, value in row.items()}) + "\n")
    return path


def _write_mimicit(schema: str, columns: dict[str, str], folder: Path) -> Path:
    rows, images = {}, {}
    for index in range(ROWS):
        images[f"IMG_{index}"] = _base64(_picture(index, folder))
        row = {"instruction": QUESTION, "answer": f"It is {_color(index)}.", "image_ids": [f"IMG_{index}"]}
        row["rel_ins_ids"] = [f"INS_{index - 1}"] if index % 2 else []
        rows[f"INS_{index}"] = {columns.get(field, field): value for field, value in row.items()}
    path = folder / "MADE_instructions.json"
    path.write_text(json.dumps({"meta": {}, "data": rows}), encoding="utf-8")
    (folder / "MADE.json").write_text(json.dumps(images), encoding="utf-8")
    return path


def _picture(index: int, folder: Path) -> Image.Image:
    """Return an image that no other row has, hardly one of another folder."""
    return Image.new("RGB", (64 + index, 48 + crc32(folder.name.encode()) % 64), _color(index))


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _base64(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


# --- a row of each schema: (index, file of its image) -> row ---


def _messages(index: int, image: str) -> Row:
    question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _color(index)}]
    return {"messages": messages, "images": [image]}


def _llava(index: int, image: str) -> Row:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": _color(index)}]
    return {"id": str(index), "image": image, "conversations": turns}


def _sharegpt(index: int, image: str) -> Row:
    return {"conversations": _llava(index, image)["conversations"], "images": [image]}


def _alpaca(index: int, image: str) -> Row:
    return {"instruction": QUESTION, "input": "", "output": _color(index), "image": image}


def _prompt_completion(index: int, image: str) -> Row:
    return {"prompt": QUESTION, "completion": _color(index), "images": [image]}


def _preference(index: int, image: str) -> Row:
    return {
        "prompt": QUESTION,
        "chosen": _color(index),
        "rejected": _color(index + 1),
        "images": [image],
    }


def _unpaired_preference(index: int, image: str) -> Row:
    good = index % 2 == 0
    completion = _color(index if good else index + 1)
    return {"prompt": QUESTION, "completion": completion, "label": good, "images": [image]}


def _cauldron(index: int, image: str) -> Row:
    return {"images": [image], "texts": [{"user": QUESTION, "assistant": _color(index)}]}


def _interleaved(index: int, image: str) -> Row:
    return {"texts": [None, f"This one is {_color(index)}."], "images": [image, None]}


def _vqa(index: int, image: str) -> Row:
    return {"question": QUESTION, "answer": _color(index), "image": image}


def _caption(index: int, image: str) -> Row:
    return {"caption": f"A {_color(index)} square.", "image": image}


ROW_MAKERS: dict[str, Callable[[int, str], Row]] = {
    "messages": _messages,
    "llava": _llava,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "preference": _preference,
    "unpaired_preference": _unpaired_preference,
    "cauldron": _cauldron,
    "interleaved": _interleaved,
    "vqa": _vqa,
    "caption": _caption,
}
