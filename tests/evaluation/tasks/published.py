"""A few rows of every task's files in the published format, with generated images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from flamingo_ft.evaluation.tasks.mme import COGNITION, PERCEPTION


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    color = tuple(path.name.encode()[-7:-4])
    Image.new("RGB", (4, 4), color).save(path, "JPEG" if path.suffix.lower() != ".png" else "PNG")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def karpathy_row(split: str, filename: str, captions: list[str], **more: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": caption.lower().split(), "raw": caption, "imgid": 0, "sentid": number}
        for number, caption in enumerate(captions)
    ]
    return {**more, "sentids": [], "imgid": 0, "sentences": sentences, "split": split, "filename": filename}


def coco(root: Path) -> None:
    rows = [
        karpathy_row("test", "COCO_val2014_000000000042.jpg", ["A cat.", " Two cats \n"], filepath="val2014"),
        karpathy_row("train", "COCO_train2014_000000000001.jpg", ["A dog. "], filepath="train2014", cocoid=1),
        karpathy_row("train", "COCO_train2014_000000000002.jpg", ["A red bus."], filepath="train2014"),
        karpathy_row("restval", "COCO_val2014_000000000003.jpg", ["A hat."], filepath="val2014"),
    ]
    write_json(root / "karpathy/dataset_coco.json", {"images": rows, "dataset": "coco"})
    for row in rows:
        write_image(root / "images" / row["filepath"] / row["filename"])


def flickr30k(root: Path) -> None:
    rows = [
        karpathy_row("test", "1000092795.jpg", ["Two men talk.", "Men outside."]),
        karpathy_row("train", "10002456.jpg", ["Men at work."]),
        karpathy_row("train", "1000268201.jpg", ["A girl climbs."]),
    ]
    write_json(root / "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    for row in rows:
        write_image(root / "flickr30k-images" / row["filename"])


def vqa_files(root: Path, prefix: str, split: str, rows: list[tuple[int, str, list[str]]]) -> None:
    """rows: image, question, answers. Annotations are written in another order than questions."""
    questions = [
        {"image_id": image, "question": question, "question_id": 1000 * image} for image, question, _ in rows
    ]
    annotations = [
        {
            "question_type": "what",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, start=1)
            ],
            "image_id": image,
            "answer_type": "yes/no" if answers[0] in ("yes", "no") else "other",
            "question_id": 1000 * image,
        }
        for image, _, answers in reversed(rows)
    ]
    write_json(
        root / f"{prefix}OpenEnded_mscoco_{split}_questions.json",
        {"info": {}, "task_type": "Open-Ended", "data_subtype": split, "questions": questions},
    )
    write_json(root / f"{prefix}mscoco_{split}_annotations.json", {"info": {}, "annotations": annotations})
    for image, _, _ in rows:
        write_image(root / split / f"COCO_{split}_{image:012}.jpg")


def vqav2(root: Path) -> None:
    vqa_files(
        root, "v2_", "val2014", [(42, "What is it?", ["cat"] * 9 + ["a cat"]), (43, "Up?", ["no"] * 10)]
    )
    vqa_files(root, "v2_", "train2014", [(1, "Is it red?", ["yes"] * 10), (2, "How many?", ["2"] * 10)])


def ok_vqa(root: Path) -> None:
    vqa_files(root, "", "val2014", [(42, "What sport is this?", ["surf"] * 6 + ["swim"] * 4)])
    vqa_files(root, "", "train2014", [(1, "What breed?", ["pug"] * 10), (2, "Who drives?", ["man"] * 10)])


def textvqa(root: Path) -> None:
    splits = {
        "val": [("003a8ae2ef43b901", "what is the brand?", ["dakota"] * 8 + ["dakota digital"] * 2)],
        "train": [("0054c91397f2fe05", "what number?", ["7"] * 10), ("005635e1", "who?", ["nokia"] * 10)],
    }
    for split, rows in splits.items():
        data = [
            {
                "question": question,
                "image_id": image,
                "image_classes": ["Camera"],
                "image_width": 1024,
                "image_height": 664,
                "answers": answers,
                "question_tokens": question.rstrip("?").split(),
                "question_id": number,
                "set_name": split,
            }
            for number, (image, question, answers) in enumerate(rows)
        ]
        whole = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
        write_json(root / f"TextVQA_0.5.1_{split}.json", whole)
        for image, _, _ in rows:
            write_image(root / "train_images" / f"{image}.jpg")


def vizwiz(root: Path) -> None:
    splits = {
        "val": [("What is this? ", ["soup"] * 7 + ["unanswerable"] * 3, "other")],
        "train": [("What color?", ["red"] * 10, "other"), ("Is it on?", ["yes"] * 10, "yes/no")],
    }
    for split, rows in splits.items():
        data = [
            {
                "image": f"VizWiz_{split}_{number:08}.jpg",
                "question": question,
                "answers": [{"answer_confidence": "yes", "answer": answer} for answer in answers],
                "answer_type": kind,
                "answerable": 1,
            }
            for number, (question, answers, kind) in enumerate(rows)
        ]
        write_json(root / "Annotations" / f"{split}.json", data)
        for row in data:
            write_image(root / split / row["image"])


def gqa(root: Path) -> None:
    splits = {
        "testdev": {"201307251": ("Is it overcast?", "n161313", "no", "verify")},
        "train": {
            "02930152": ("Who is sitting?", "2354786", "man", "query"),
            "07333408": ("Is there a bird?", "2375429", "yes", "exist"),
        },
    }
    for split, rows in splits.items():
        data = {
            key: {
                "semantic": [],
                "question": question,
                "imageId": image,
                "isBalanced": True,
                "answer": answer,
                "fullAnswer": answer,
                "types": {"detailed": "x", "semantic": "global", "structural": kind},
            }
            for key, (question, image, answer, kind) in rows.items()
        }
        write_json(root / "questions1.2" / f"{split}_balanced_questions.json", data)
        for row in data.values():
            write_image(root / "images" / f"{row['imageId']}.jpg")


def pope(root: Path) -> None:
    image = "COCO_val2014_000000310196.jpg"
    for subset in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": 1, "image": image, "text": "Is there a snowboard in the image?", "label": "yes"},
            {"question_id": 2, "image": image, "text": f"Is there a {subset} in the image?", "label": "no"},
        ]
        write_lines(root / f"coco_pope_{subset}.json", rows)
    write_image(root / "val2014" / image)


def scienceqa(root: Path) -> None:
    problems = {
        "5": ("Which is north?", ["Utah", "Iowa"], 1, "image.png", "test", ""),
        "7": ("Which rhymes?", ["cat", "dog", "hat"], 0, None, "test", "Read them."),
        "1": ("Which is a solid?", ["ice", "air"], 0, "image.png", "train", "Look."),
        "2": ("Which is wet?", ["sand", "sea"], 1, None, "train", ""),
    }
    rows = {
        number: {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "image": image,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "split": split,
            "lecture": "",
            "solution": "",
        }
        for number, (question, choices, answer, image, split, hint) in problems.items()
    }
    write_json(root / "data/scienceqa/problems.json", rows)
    splits = {split: [n for n, row in rows.items() if row["split"] == split] for split in ("train", "test")}
    write_json(root / "data/scienceqa/pid_splits.json", splits)
    for number, row in rows.items():
        if row["image"]:
            write_image(root / "images" / row["split"] / number / row["image"])


def hateful_memes(root: Path) -> None:
    splits = {
        "dev_seen": [(8291, 1, "white people is this a shooting range")],
        "train": [(42953, 0, "its their character"), (23058, 1, "don't be afraid")],
    }
    for split, rows in splits.items():
        data = [
            {"id": number, "img": f"img/{number:05}.png", "label": label, "text": text}
            for number, label, text in rows
        ]
        write_lines(root / f"{split}.jsonl", data)
        for row in data:
            write_image(root / row["img"])


def imagenet(root: Path) -> None:
    names = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane bird"}
    lines = [f"{synset} {name}\n" for synset, name in names.items()]
    root.mkdir(parents=True, exist_ok=True)
    (root / "classnames.txt").write_text("".join(lines), encoding="utf-8")
    for synset in names:
        write_image(root / "images/train" / synset / f"{synset}_10026.JPEG")
    write_image(root / "images/val/n01440764/ILSVRC2012_val_00000293.JPEG")
    write_image(root / "images/val/n02012849/ILSVRC2012_val_00000001.JPEG")


def mme(root: Path) -> None:
    base = root / "MME_Benchmark_release_version/MME_Benchmark"
    for subset in (*PERCEPTION, *COGNITION):
        in_folders = subset in ("posters", "celebrity", "scene", "landmark", "artwork")
        images = base / subset / ("images" if in_folders else "")
        texts = base / subset / ("questions_answers_YN" if in_folders else "")
        write_image(images / ("0001.png" if subset == "code_reasoning" else "0001.jpg"))
        texts.mkdir(parents=True, exist_ok=True)
        lines = [f"Is it {word}? Please answer yes or no.\t{word}\n" for word in ("Yes", "No")]
        (texts / "0001.txt").write_text("".join(lines), encoding="utf-8")


def classification(root: Path) -> None:
    splits = {
        "val": [("new/1.jpg", "dax")],
        "train": [("old/1.jpg", "wug"), ("old/2.jpg", "dax "), ("old/3.jpg", "fep")],
    }
    for split, rows in splits.items():
        write_lines(root / f"{split}.jsonl", [{"image": image, "label": label} for image, label in rows])
        for image, _ in rows:
            write_image(root / image)


FILES: Mapping[str, Callable[[Path], None]] = {
    "coco": coco,
    "flickr30k": flickr30k,
    "vqav2": vqav2,
    "ok_vqa": ok_vqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "pope": pope,
    "scienceqa": scienceqa,
    "hateful_memes": hateful_memes,
    "imagenet": imagenet,
    "mme": mme,
    "classification": classification,
}
