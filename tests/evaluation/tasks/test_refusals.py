"""A missing file, another format, missing images: one line that names file, row and what to do."""

import json
import shutil

import pytest

from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.tasks import TASKS, check_images, find_task


@pytest.fixture
def copied(published, tmp_path):
    """Return a function that copies a task's files, to be spoiled."""
    return lambda name: shutil.copytree(published[name], tmp_path / name)


def refusal(name, root):
    task = TASKS[name]
    with pytest.raises(UserError) as error:
        check_images(task.eval_examples(task.open(root)))
    message = str(error.value)
    assert "\n" not in message and ";" in message
    return message.replace(f"{root}/", "").replace(str(root), "FOLDER")


FIRST_FILES = {
    "coco": "file dataset_coco.json",
    "flickr30k": "file dataset_flickr30k.json",
    "vqav2": "file v2_OpenEnded_mscoco_val2014_questions.json",
    "ok_vqa": "file OpenEnded_mscoco_val2014_questions.json",
    "textvqa": "file TextVQA_0.5.1_val.json",
    "vizwiz": "file val.json",
    "gqa": "file testdev_balanced_questions.json",
    "pope": "file coco_pope_random.json",
    "scienceqa": "file problems.json",
    "hateful_memes": "file dev_seen.jsonl or dev.jsonl",
    "imagenet": "file classnames.txt or LOC_synset_mapping.txt",
    "mme": "folder existence",
}


@pytest.mark.parametrize("name", FIRST_FILES)
def test_an_empty_folder_is_refused_with_the_name_of_what_is_missing(name, tmp_path):
    message = refusal(name, tmp_path)
    assert message.startswith(f"FOLDER: no {FIRST_FILES[name]}; get ") and TASKS[name].source in message


def test_own_images_without_their_files_are_refused_with_the_form_of_a_row(tmp_path):
    assert refusal("classification", tmp_path) == (
        'FOLDER: no file train.jsonl; write one, {"image": PATH, "label": TEXT} in each line'
    )


def test_a_row_without_a_label_is_refused(copied):
    root = copied("classification")
    (root / "val.jsonl").write_text(json.dumps({"image": "new/1.jpg", "label": " "}))
    assert refusal("classification", root).startswith("val.jsonl: row 0: label: expected text, got an empty")


def test_an_image_folder_that_is_missing_is_named(copied):
    root = copied("vqav2")
    shutil.rmtree(root / "val2014")
    assert refusal("vqav2", root) == (
        "FOLDER: no folder val2014 with COCO_val2014_000000000042.jpg; "
        "unpack the images of https://visualqa.org/download.html there"
    )


def test_a_folder_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"^/no/where: no such folder; name the folder that the files of"):
        TASKS["vqav2"].open("/no/where")


# The file of each task, what is put in the place of a field of its first row, and the error.
SPOILED = {
    "coco": (
        "karpathy/dataset_coco.json",
        ["images", 0, "sentences"],
        "A cat.",
        "row 0: sentences: expected a list, got text",
    ),
    "flickr30k": (
        "dataset_flickr30k.json",
        ["images", 0, "filename"],
        3,
        "row 0: filename: expected text, got a number",
    ),
    "vqav2": (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        ["questions", 0, "question_id"],
        5,
        "row 0: v2_mscoco_val2014_annotations.json has no annotation of its question",
    ),
    "ok_vqa": (
        "mscoco_val2014_annotations.json",
        ["annotations", 0, "answers"],
        [],
        "row 0: answers: expected at least one, got an empty list",
    ),
    "textvqa": (
        "TextVQA_0.5.1_val.json",
        ["data", 0, "answers", 1],
        {"answer": "dakota"},
        "row 0: answers[1]: expected text, got an object",
    ),
    "vizwiz": (
        "Annotations/val.json",
        [0, "answers", 2],
        "soup",
        "row 0: answers[2]: expected an object with the text 'answer', got text",
    ),
    "gqa": (
        "questions1.2/testdev_balanced_questions.json",
        ["201307251", "types"],
        None,
        "row '201307251': types: expected an object, got null (no value)",
    ),
    "scienceqa": (
        "data/scienceqa/problems.json",
        ["5", "answer"],
        2,
        "row '5': answer: expected the index of one of 2 choices, got 2",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_field_is_named_with_its_file_and_row(name, copied):
    root = copied(name)
    file, keys, value, expected = SPOILED[name]
    whole = inside = json.loads((root / file).read_text())
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    (root / file).write_text(json.dumps(whole))
    assert refusal(name, root) == f"{file}: {expected}; give a file as {TASKS[name].source} describes it"


@pytest.mark.parametrize(
    "name, file, line, expected",
    [
        (
            "pope",
            "coco_pope_random.json",
            '{"image": "a.jpg", "text": "Is?"}',
            "row 0: label: missing; expected text",
        ),
        (
            "pope",
            "coco_pope_random.json",
            '{"image": "a.jpg", "label": "Yes"}',
            "row 0: label: expected yes or no, got 'Yes'",
        ),
        ("hateful_memes", "dev_seen.jsonl", '{"img": "img/1.png", "text": "a"}', "row 0: label: missing"),
        (
            "hateful_memes",
            "dev_seen.jsonl",
            '{"img": "img/1.png", "label": 2}',
            "row 0: label: expected 0 or 1, got 2",
        ),
        ("hateful_memes", "dev_seen.jsonl", "[1]", "row 0: expected an object, got a list"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_row(name, file, line, expected, copied):
    root = copied(name)
    (root / file).write_text(f"{line}\n")
    assert refusal(name, root).startswith(f"{file}: {expected}; ")


@pytest.mark.parametrize("name", ["coco", "vqav2", "textvqa"])
def test_a_list_in_place_of_the_published_object_is_refused(name, copied):
    root = copied(name)
    for path in root.rglob("*.json"):
        path.write_text("[]")
    assert "expected an object, got a list" in refusal(name, root)


def test_text_that_is_not_json_is_refused(copied):
    root = copied("gqa")
    (root / "questions1.2/testdev_balanced_questions.json").write_text("<html>")
    assert refusal("gqa", root).startswith("questions1.2/testdev_balanced_questions.json: not JSON (")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Is it? Please answer yes or no.\tYes\n", "expected 2 questions, got 1"),
        (
            "Is it?\tYes\nIs it not? No\n",
            "row 1: expected a question, a tab and Yes or No, got 'Is it not? No'",
        ),
    ],
)
def test_wrong_questions_of_mme_are_refused(text, expected, copied):
    root = copied("mme")
    (root / "MME_Benchmark_release_version/MME_Benchmark/OCR/0001.txt").write_text(text)
    assert expected in refusal("mme", root)


def test_missing_subsets_of_mme_are_named(copied):
    root = copied("mme")
    for subset in ("OCR", "code_reasoning"):
        shutil.rmtree(root / "MME_Benchmark_release_version/MME_Benchmark" / subset)
    assert "MME_Benchmark: no folder OCR, code_reasoning; " in refusal("mme", root)


def test_validation_images_of_imagenet_that_are_not_sorted_are_refused(copied):
    root = copied("imagenet")
    shutil.rmtree(root / "images/val")
    (root / "images/val").mkdir()
    assert refusal("imagenet", root) == (
        "images/val: has no folder of a synset, such as n01440764; "
        "sort the images into a folder for each synset, as valprep.sh does"
    )


def test_a_synset_without_a_name_is_refused(copied):
    root = copied("imagenet")
    (root / "classnames.txt").write_text("n01440764 tench\n")
    assert refusal("imagenet", root) == (
        "images/val/n02012849: classnames.txt has no name for it; add a line that begins with n02012849"
    )
    (root / "classnames.txt").write_text("tench\n")
    assert refusal("imagenet", root).startswith("classnames.txt: row 0: expected a synset and its name")


def test_missing_images_are_counted_and_the_first_is_named(copied):
    root = copied("pope")
    (root / "val2014/COCO_val2014_000000310196.jpg").unlink()
    assert refusal("pope", root) == (
        "coco_pope_random.json: row 0: no image val2014/COCO_val2014_000000310196.jpg; "
        "1 of 1 image is missing, unpack the published images there"
    )
    root = copied("mme")
    for path in root.rglob("*.jpg"):
        path.unlink()
    assert refusal("mme", root).endswith("; 13 of 14 images are missing, unpack the published images there")


def test_two_files_of_a_name_are_refused_because_either_could_be_meant(copied):
    root = copied("textvqa")
    (root / "old").mkdir()
    shutil.copy(root / "TextVQA_0.5.1_val.json", root / "old")
    message = refusal("textvqa", root)
    assert message.startswith("FOLDER: got 2 files named TextVQA_0.5.1_val.json, ")
    assert message.endswith("; name the folder of one of them")


def test_a_task_without_training_rows_says_so(published):
    for name in ("pope", "mme"):
        task = TASKS[name]
        with pytest.raises(UserError, match=f"^{name}: has no training rows to draw demonstrations from; "):
            task.train_examples(task.open(published[name]))


def test_a_split_without_rows_is_refused(copied):
    root = copied("coco")
    file = root / "karpathy/dataset_coco.json"
    file.write_text(file.read_text().replace('"test"', '"val"'))
    assert refusal("coco", root).startswith("FOLDER: no rows of split test; ")


def test_an_unknown_task_is_refused_with_the_nearest_names():
    with pytest.raises(UserError, match=r"^task: got 'VQA-v2'; use one of vqav2"):
        find_task("VQA-v2")
    assert find_task("gqa") is TASKS["gqa"]
