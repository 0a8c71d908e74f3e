"""Every task reads its published format: rows, images, right answers."""

import pytest

from flamingo_ft.evaluation.tasks import TASKS, Example, check_images

from .published import FILES


def eval_examples(name, published):
    task = TASKS[name]
    return task.eval_examples(task.open(published[name]))


def train_examples(name, published):
    task = TASKS[name]
    return task.train_examples(task.open(published[name]))


def inside(example: Example, root):
    """The example's file and images relative to the folder, its row, and what it asks."""
    where = example.where.replace(f"{root}/", "")
    images = [path.replace(f"{root}/", "") for path in example.images]
    return where, images, example.question


def test_every_task_has_files_in_these_tests():
    assert {*FILES} == {*TASKS}


@pytest.mark.parametrize("name", TASKS)
def test_every_image_that_a_task_names_is_found(name, published):
    examples = eval_examples(name, published)
    if TASKS[name].train_split:
        examples += train_examples(name, published)
    check_images(examples)
    assert any(example.images for example in examples)
    assert all(example.references for example in examples)


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_given_where_they_are_ranked_and_hold_the_right_answer(name, published):
    for example in eval_examples(name, published):
        assert bool(example.labels) == TASKS[name].ranks_labels
        if example.labels:
            assert {*example.references} <= {*example.labels}
            assert len({*example.labels}) == len(example.labels)


def test_coco_has_the_test_split_with_all_captions_and_trains_without_restval(published):
    (example,) = eval_examples("coco", published)
    assert inside(example, published["coco"]) == (
        "karpathy/dataset_coco.json: row 0",
        ["images/val2014/COCO_val2014_000000000042.jpg"],
        "",
    )
    assert example.references == ("A cat.", "Two cats")
    train = train_examples("coco", published)
    assert [one.references for one in train] == [("A dog.",), ("A red bus.",)]
    assert train[1].where.endswith("dataset_coco.json: row 2")


def test_flickr30k_has_the_test_split_with_all_captions(published):
    (example,) = eval_examples("flickr30k", published)
    assert inside(example, published["flickr30k"])[1] == ["flickr30k-images/1000092795.jpg"]
    assert example.references == ("Two men talk.", "Men outside.")
    assert len(train_examples("flickr30k", published)) == 2


def test_vqav2_joins_annotations_by_question(published):
    first, second = eval_examples("vqav2", published)
    assert inside(first, published["vqav2"]) == (
        "v2_OpenEnded_mscoco_val2014_questions.json: row 0",
        ["val2014/COCO_val2014_000000000042.jpg"],
        "What is it?",
    )
    assert first.references == ("cat",) * 9 + ("a cat",) and first.category == "other"
    assert second.references == ("no",) * 10 and second.category == "yes/no"
    assert [one.references[0] for one in train_examples("vqav2", published)] == ["yes", "2"]


def test_ok_vqa_reads_files_without_the_prefix_of_version_2(published):
    (example,) = eval_examples("ok_vqa", published)
    assert example.references == ("surf",) * 6 + ("swim",) * 4
    assert inside(example, published["ok_vqa"])[1] == ["val2014/COCO_val2014_000000000042.jpg"]


def test_textvqa_has_validation_images_among_the_training_images(published):
    (example,) = eval_examples("textvqa", published)
    assert inside(example, published["textvqa"]) == (
        "TextVQA_0.5.1_val.json: row 0",
        ["train_images/003a8ae2ef43b901.jpg"],
        "what is the brand?",
    )
    assert example.references == ("dakota",) * 8 + ("dakota digital",) * 2


def test_vizwiz_keeps_questions_as_they_are_and_unanswerable_ones(published):
    (example,) = eval_examples("vizwiz", published)
    assert inside(example, published["vizwiz"]) == (
        "Annotations/val.json: row 0",
        ["val/VizWiz_val_00000000.jpg"],
        "What is this? ",
    )
    assert example.references == ("soup",) * 7 + ("unanswerable",) * 3
    assert [one.category for one in train_examples("vizwiz", published)] == ["other", "yes/no"]


def test_gqa_rows_are_named_by_their_question(published):
    (example,) = eval_examples("gqa", published)
    assert inside(example, published["gqa"]) == (
        "questions1.2/testdev_balanced_questions.json: row '201307251'",
        ["images/n161313.jpg"],
        "Is it overcast?",
    )
    assert (example.references, example.category) == (("no",), "verify")


def test_pope_has_its_three_files_as_categories(published):
    examples = eval_examples("pope", published)
    assert [one.category for one in examples] == ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2
    assert [one.references for one in examples] == [("yes",), ("no",)] * 3
    assert inside(examples[3], published["pope"]) == (
        "coco_pope_popular.json: row 1",
        ["val2014/COCO_val2014_000000310196.jpg"],
        "Is there a popular in the image?",
    )


def test_scienceqa_has_problems_of_text_alone_too(published):
    picture, text = eval_examples("scienceqa", published)
    assert inside(picture, published["scienceqa"]) == (
        "data/scienceqa/problems.json: row '5'",
        ["images/test/5/image.png"],
        "Which is north?\nContext: N/A\nOptions: (A) Utah (B) Iowa",
    )
    assert (picture.references, picture.labels, picture.category) == (("B",), ("A", "B"), "image")
    assert text.question == "Which rhymes?\nContext: Read them.\nOptions: (A) cat (B) dog (C) hat"
    assert (text.images, text.references, text.labels) == ((), ("A",), ("A", "B", "C"))
    assert text.category == "text only"


def test_hateful_memes_are_yes_or_no(published):
    (example,) = eval_examples("hateful_memes", published)
    assert inside(example, published["hateful_memes"]) == (
        "dev_seen.jsonl: row 0",
        ["img/08291.png"],
        "white people is this a shooting range",
    )
    assert (example.references, example.labels) == (("yes",), ("no", "yes"))
    assert [one.references for one in train_examples("hateful_memes", published)] == [("no",), ("yes",)]


def test_hateful_memes_first_release_is_read(published, tmp_path):
    for split, name in (("train", "train"), ("dev_seen", "dev")):
        content = (published["hateful_memes"] / f"{split}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "img").mkdir()
    task = TASKS["hateful_memes"]
    (example,) = task.eval_examples(task.open(tmp_path))
    assert example.where.endswith("dev.jsonl: row 0")


def test_imagenet_ranks_the_names_of_all_synsets(published):
    first, second = eval_examples("imagenet", published)
    assert inside(first, published["imagenet"])[1] == ["images/val/n01440764/ILSVRC2012_val_00000293.JPEG"]
    assert (first.references, second.references) == (("tench",), ("crane bird",))
    assert first.labels == ("tench", "goldfish", "crane bird")
    assert len(train_examples("imagenet", published)) == 3


def test_imagenet_takes_the_first_of_kaggles_synonyms_and_counts_equal_names_once(published, tmp_path):
    lines = ["n01440764 tench, Tinca tinca", "n01443537 goldfish", "n02012849 crane", "n03126707 crane"]
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    (tmp_path / "val").symlink_to(published["imagenet"] / "images/val")
    task = TASKS["imagenet"]
    first, second = task.eval_examples(task.open(tmp_path))
    assert first.labels == ("tench", "goldfish", "crane") and second.references == ("crane",)


def test_mme_has_two_questions_an_image_in_both_kinds_of_folders(published):
    examples = eval_examples("mme", published)
    assert len(examples) == 2 * 14
    assert [one.references for one in examples[:2]] == [("yes",), ("no",)]
    by_subset = {one.category: one for one in examples}
    base = "MME_Benchmark_release_version/MME_Benchmark"
    assert inside(by_subset["count"], published["mme"]) == (
        f"{base}/count/0001.txt: row 1",
        [f"{base}/count/0001.jpg"],
        "Is it No? Please answer yes or no.",
    )
    assert inside(by_subset["scene"], published["mme"])[:2] == (
        f"{base}/scene/questions_answers_YN/0001.txt: row 1",
        [f"{base}/scene/images/0001.jpg"],
    )
    assert by_subset["code_reasoning"].images[0].endswith("code_reasoning/0001.png")


def test_classification_ranks_the_labels_of_both_files(published):
    (example,) = eval_examples("classification", published)
    assert inside(example, published["classification"]) == ("val.jsonl: row 0", ["new/1.jpg"], "")
    assert (example.references, example.labels) == (("dax",), ("dax", "fep", "wug"))
    assert [one.references[0] for one in train_examples("classification", published)] == ["wug", "dax", "fep"]


def test_files_are_found_at_any_depth_and_beside_what_archives_leave(published, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/textvqa").symlink_to(published["textvqa"])
    for path in (tmp_path / "__MACOSX" / "TextVQA_0.5.1_val.json", tmp_path / "._TextVQA_0.5.1_val.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x00")
    (tmp_path / "a/round").symlink_to(tmp_path)
    task = TASKS["textvqa"]
    assert len(task.eval_examples(task.open(tmp_path))) == 1


def test_of_two_image_folders_of_a_name_the_one_with_the_image_is_taken(published, tmp_path):
    (tmp_path / "other/val").mkdir(parents=True)
    (tmp_path / "vizwiz").symlink_to(published["vizwiz"])
    task = TASKS["vizwiz"]
    (example,) = task.eval_examples(task.open(tmp_path))
    assert example.images == (str(tmp_path / "vizwiz/val/VizWiz_val_00000000.jpg"),)
