"""One data set per schema and per kind of source, all of the same real scans of digits.

`FIXTURES` maps a name to a function that writes the fixture into a folder and returns an entry of
``data.train``.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import datasets
from PIL import Image

SCANS = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
QUESTION = "Which digit is this?"
FACTS = (("1442.png", "Three."), ("0690.png", "Eight."), ("0945.png", "Nine."))  # a scan and what it shows
PAIR_QUESTION = "Are they the same digit?"
DOCUMENT = ("A page about digits.", "The first scan.", "The second scan.", "The end.")

Write = Callable[[Path], dict[str, Any]]
FIXTURES: dict[str, Write] = {}


def fixture(write: Write) -> Write:
    FIXTURES[write.__name__] = write
    return write


# Schemas, each in its usual file format.


@fixture
def messages(folder):
    return jsonl(
        folder, [dialogue(f"<image>{QUESTION}", answer) | {"images": [put(folder, s)]} for s, answer in FACTS]
    )


@fixture
def messages_openai(folder):
    """Images in the dialogue, as data: URIs."""
    return jsonl(folder, [dialogue([image_url(scan), text(QUESTION)], answer) for scan, answer in FACTS])


@fixture
def messages_trl(folder):
    """Typed blocks without image blocks, and images beside them."""
    return jsonl(
        folder,
        [dialogue([text(QUESTION)], [text(answer)]) | {"images": [put(folder, s)]} for s, answer in FACTS],
    )


@fixture
def messages_two_images(folder):
    """A row of two images with a first answer without loss, and a row of text only."""
    first, second = (put(folder, scan) for scan, _ in FACTS[:2])
    opening = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello.", "loss": False},
    ]
    row = dialogue(f"<image> and <image> {PAIR_QUESTION}", "No.")
    row["messages"] = [{"role": "system", "content": "Be brief."}, *opening, *row["messages"]]
    return jsonl(
        folder, [row | {"images": [first, second], "task": "same"}, dialogue("What is 1 + 1?", "Two.")]
    )


@fixture
def llava(folder):
    return as_json(
        folder,
        [
            {
                "id": scan[:4],
                "image": put(folder, scan),
                "conversations": [
                    {"from": "human", "value": f"<image>\n{QUESTION}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for scan, answer in FACTS
        ],
    )


@fixture
def sharegpt(folder):
    return as_json(
        folder,
        [
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": f"<image>{QUESTION}"},
                    {"from": "gpt", "value": answer},
                ],
                "images": [put(folder, scan)],
            }
            for scan, answer in FACTS
        ],
    )


@fixture
def alpaca(folder):
    return as_json(
        folder,
        [
            {"instruction": QUESTION, "input": "", "output": answer, "image": put(folder, s)}
            for s, answer in FACTS
        ],
    )


@fixture
def prompt_completion(folder):
    return jsonl(
        folder,
        [{"prompt": QUESTION, "completion": answer, "images": [put(folder, scan)]} for scan, answer in FACTS],
    )


@fixture
def vqa(folder):
    """Answers of several people, as in VQAv2."""
    return jsonl(
        folder,
        [
            {
                "question": QUESTION,
                "answers": [{"answer": "Seven."}, *[{"answer": answer}] * 2],
                "image": put(folder, s),
            }
            for s, answer in FACTS
        ],
    )


@fixture
def vqa_mapped(folder):
    """Columns of other names."""
    rows = [{"q": QUESTION, "label": answer, "photo": put(folder, scan)} for scan, answer in FACTS]
    return jsonl(folder, rows) | {"columns": {"question": "q", "answer": "label", "image": "photo"}}


@fixture
def caption(folder):
    return jsonl(
        folder, [{"image": put(folder, scan), "captions": [answer, "A digit."]} for scan, answer in FACTS]
    )


@fixture
def mimicit(folder):
    """The later rows have the first as their example."""
    keys = [f"D_IMG_{index}" for index in range(len(FACTS))]
    (folder / "D_images.json").write_text(
        json.dumps({key: base64_of(s) for key, (s, _) in zip(keys, FACTS, strict=True)})
    )
    data = {
        f"D_INS_{index}": {
            "instruction": QUESTION,
            "answer": answer,
            "image_ids": [keys[index]],
            "rel_ins_ids": ["D_INS_0"] if index else [],
        }
        for index, (_, answer) in enumerate(FACTS)
    }
    path = folder / "D_instructions.json"
    path.write_text(json.dumps({"meta": {"version": "1"}, "data": data}))
    return {"path": str(path)}


@fixture
def messages_llava_mix(folder):
    """As HuggingFaceH4/llava-instruct-mix-vsft has them: each block has all keys."""
    block = {
        "index": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "type": datasets.Value("string"),
    }
    message = {"content": datasets.List(block), "role": datasets.Value("string")}
    features = datasets.Features(
        {"messages": datasets.List(message), "images": datasets.List(datasets.Image())}
    )
    image = {"index": 0, "text": None, "type": "image"}
    rows = [
        dialogue([image, {"index": None, **text(QUESTION)}], [{"index": None, **text(answer)}])
        | {"images": [struct(scan)]}
        for scan, answer in FACTS
    ]
    return parquet(folder, rows, features)


@fixture
def cauldron(folder):
    """As The Cauldron has them, in Parquet."""
    pair = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(pair)})
    rows = [
        {
            "images": [struct(scan)],
            "texts": [{"user": QUESTION, "assistant": answer, "source": "scans"}],
        }
        for scan, answer in FACTS
    ]
    return parquet(folder, rows, features)


@fixture
def interleaved_mmc4(folder):
    return jsonl(folder, [mmc4_row(lambda scan: {"image_name": put(folder, scan)})])


@fixture
def interleaved_obelics(folder):
    """Texts and images side by side, the images as bytes."""
    row = {
        "texts": [DOCUMENT[0], None, DOCUMENT[1], None, DOCUMENT[2], DOCUMENT[3]],
        "images": [None, struct(FACTS[0][0]), None, struct(FACTS[1][0]), None, None],
    }
    features = datasets.Features(
        {"texts": datasets.List(datasets.Value("string")), "images": datasets.List(datasets.Image())}
    )
    return parquet(folder, [row], features)


@fixture
def preference(folder):
    """As TRL has them: messages."""
    return jsonl(
        folder,
        [
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, text(QUESTION)]}],
                "chosen": [{"role": "assistant", "content": [text(answer)]}],
                "rejected": [{"role": "assistant", "content": [text("Zero.")]}],
                "images": [put(folder, scan)],
            }
            for scan, answer in FACTS
        ],
    )


@fixture
def preference_text(folder):
    return jsonl(
        folder,
        [
            {"prompt": QUESTION, "chosen": answer, "rejected": "Zero.", "images": [put(folder, scan)]}
            for scan, answer in FACTS
        ],
    )


@fixture
def unpaired_preference(folder):
    """Labels as JSON has them; rows of tables may have them as text or numbers."""
    labels = (True, "false", 1)
    return jsonl(
        folder,
        [
            {"prompt": QUESTION, "completion": answer, "label": label, "images": [put(folder, scan)]}
            for (scan, answer), label in zip(FACTS, labels, strict=True)
        ],
    )


@fixture
def frames(folder):
    """A video as a list of its frames."""
    frames = [put(folder, scan) for scan, _ in FACTS]
    return jsonl(
        folder, [dialogue("<image>Which digits are these?", "Three, eight and nine.") | {"video": frames}]
    )


@fixture
def video(folder):
    """A video file of four seconds, a scan a second."""
    write_video(folder / "digits.mp4", [Image.open(SCANS / FACTS[i % 3][0]) for i in range(4)])
    return jsonl(folder, [dialogue("<video>Which digits are these?", "Some.") | {"videos": ["digits.mp4"]}])


# Kinds of sources.


@fixture
def json_object(folder):
    """A list of rows under a name, as VQAv2 has it."""
    rows = [{"question": QUESTION, "answer": answer, "image": put(folder, scan)} for scan, answer in FACTS]
    path = folder / "questions.json"
    path.write_text(json.dumps({"info": {"version": "1"}, "questions": rows}))
    return {"path": str(path)}


@fixture
def csv_captions(folder):
    return delimited(
        folder / "captions.csv", ",", [("image", "caption"), *((put(folder, s), a) for s, a in FACTS)]
    )


@fixture
def tsv_questions(folder):
    rows = [
        ("question", "answer", "image"),
        *((QUESTION, answer, put(folder, scan)) for scan, answer in FACTS),
    ]
    return delimited(folder / "questions.tsv", "\t", rows)


@fixture
def jsonl_base64(folder):
    return jsonl(folder, [{"question": QUESTION, "answer": a, "image": base64_of(scan)} for scan, a in FACTS])


@fixture
def jsonl_streamed(folder):
    return messages(folder) | {"streaming": True}


@fixture
def parquet_bytes(folder):
    """As the Hub stores images: their files' content, and class labels as numbers."""
    rows = [{"image": struct(scan), "question": QUESTION, "answer": i} for i, (scan, _) in enumerate(FACTS)]
    return parquet(folder, rows, labelled_features())


@fixture
def parquet_streamed(folder):
    return parquet_bytes(folder) | {"streaming": True}


@fixture
def arrow(folder):
    rows = [{"image": struct(scan), "question": QUESTION, "answer": i} for i, (scan, _) in enumerate(FACTS)]
    dataset(rows, labelled_features()).save_to_disk(folder / "saved")
    (path,) = (folder / "saved").glob("*.arrow")
    return {"path": str(path)}


@fixture
def saved_dataset(folder):
    arrow(folder)
    return {"path": str(folder / "saved")}


@fixture
def dataset_folder(folder):
    """A copy of a dataset on the Hub: a folder of Parquet files."""
    (folder / "copy").mkdir()
    parquet_bytes(folder / "copy")
    return {"path": str(folder / "copy")}


@fixture
def hub(folder):
    """`load_dataset` takes a folder in place of a name on the Hub, which needs no network."""
    return {"hub": dataset_folder(folder)["path"], "split": "train"}


@fixture
def imagefolder_jsonl(folder):
    rows = [{"file_name": put(folder / "scans", scan), "text": answer} for scan, answer in FACTS]
    (folder / "scans" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(folder / "scans")}


@fixture
def imagefolder_csv(folder):
    rows = [("file_name", "caption"), *((put(folder / "scans", scan), answer) for scan, answer in FACTS)]
    delimited(folder / "scans" / "metadata.csv", ",", rows)
    return {"path": str(folder / "scans")}


@fixture
def imagefolder_classes(folder):
    """In folders named for what the images show."""
    for scan, answer in FACTS:
        put(folder / "scans" / answer, scan)
    return {"path": str(folder / "scans")}


@fixture
def tar_captions(folder):
    return {"path": str(write_tar(folder / "captions.tar", FACTS))}


@fixture
def tar_compressed(folder):
    return {"path": str(write_tar(folder / "captions.tar.gz", FACTS))}


@fixture
def tar_shards(folder):
    """A pattern of two tars, streamed."""
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "000.tar", FACTS[:2])
    write_tar(folder / "shards" / "001.tar", FACTS[2:])
    return {"path": str(folder / "shards" / "*.tar"), "streaming": True}


@fixture
def tar_mmc4(folder):
    """As OpenFlamingo converted MMC4: each document a JSON with its images in base64."""
    row = mmc4_row(lambda scan: {"image_base64": base64_of(scan)})
    return {"path": str(add_files(folder / "mmc4.tar", {"0.json": json.dumps(row).encode()}))}


@fixture
def tar_mmc4_files(folder):
    """The images as files beside the JSON."""
    row = mmc4_row(lambda scan: {"image_name": scan})
    pictures = {f"0.{scan}": (SCANS / scan).read_bytes() for scan, _ in FACTS[:2]}
    return {"path": str(add_files(folder / "mmc4.tar", {"0.json": json.dumps(row).encode()} | pictures))}


# Helpers.


def put(folder: Path, scan: str) -> str:
    """The scan copied into a folder; its name."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCANS / scan, folder / scan)
    return scan


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image_url(scan: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(scan)}"}}


def base64_of(scan: str) -> str:
    return base64.b64encode((SCANS / scan).read_bytes()).decode()


def struct(scan: str) -> dict[str, Any]:
    return {"bytes": (SCANS / scan).read_bytes(), "path": scan}


def dialogue(question: Any, answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def mmc4_row(picture: Callable[[str], dict[str, str]]) -> dict[str, Any]:
    """A document whose second text was matched with the first scan, and whose third with the second."""
    infos = [{"matched_text_index": i + 1, "matched_sim": 0.3, **picture(FACTS[i][0])} for i in (1, 0)]
    return {"text_list": [*DOCUMENT], "image_info": infos, "url": "http://example.org"}


def jsonl(folder: Path, rows: list) -> dict[str, Any]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def as_json(folder: Path, rows: list) -> dict[str, Any]:
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return {"path": str(path)}


def delimited(path: Path, delimiter: str, rows: list[tuple]) -> dict[str, Any]:
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return {"path": str(path)}


def labelled_features() -> datasets.Features:
    names = datasets.ClassLabel(names=[answer for _, answer in FACTS])
    return datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": names}
    )


def dataset(rows: list, features: datasets.Features) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=features)


def parquet(folder: Path, rows: list, features: datasets.Features) -> dict[str, Any]:
    path = folder / "data.parquet"
    dataset(rows, features).to_parquet(path)
    return {"path": str(path)}


def write_tar(path: Path, facts: tuple) -> Path:
    """A caption shard: key.png and key.txt."""
    files: dict[str, bytes] = {}
    for scan, answer in facts:
        files |= {scan: (SCANS / scan).read_bytes(), scan.replace(".png", ".txt"): answer.encode()}
    return add_files(path, files)


def add_files(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_video(path: Path, pictures: list[Image.Image], frames_each: int = 4) -> Path:
    """Each picture for some frames, 64 x 64 pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=frames_each)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for _ in range(frames_each):
                container.mux(
                    stream.encode(av.VideoFrame.from_image(picture.convert("RGB").resize((64, 64))))
                )
        container.mux(stream.encode(None))
    return path
