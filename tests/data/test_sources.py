"""Every schema and every kind of source gives the expected samples, read in order or by number."""

import json
import multiprocessing
import pickle
import random
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import open_medium, open_source, read_samples
from flamingo_ft.data.sample import Video
from flamingo_ft.errors import UserError

from .dialogues import IMAGE, assistant, blocks, system, user
from .fixtures import DOCUMENT, FACTS, FIXTURES, PAIR_QUESTION, QUESTION, SCANS, jsonl, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(entry: dict, **options):
    source = DataSource(**entry)
    return open_source(source, DataSection(train=(source,), **options))


def samples_of(source) -> list:
    return [source.sample(index, raw) for index, raw in enumerate(source.stream())]


def asked(scan, answer, *before):
    return [*before, user(IMAGE, QUESTION), assistant(answer)], [scan]


def document(*parts):
    return [{"role": "document", "content": blocks(parts)}]


QUESTIONS = [asked(*fact) for fact in FACTS]
CAPTIONS = [(document(IMAGE, answer), [scan]) for scan, answer in FACTS]
INTERLEAVED = [
    (document(DOCUMENT[0], IMAGE, DOCUMENT[1], IMAGE, DOCUMENT[2], DOCUMENT[3]), [FACTS[0][0], FACTS[1][0]])
]
IN_CONTEXT = [
    QUESTIONS[0],
    *[(QUESTIONS[0][0] + messages, QUESTIONS[0][1] + images) for messages, images in QUESTIONS[1:]],
]
HELLO = [user("Hello."), {**assistant("Hello."), "loss": False}]
TWO_IMAGES = [
    (
        [system("Be brief."), *HELLO, user(IMAGE, " and ", IMAGE, f" {PAIR_QUESTION}"), assistant("No.")],
        [FACTS[0][0], FACTS[1][0]],
    ),
    ([user("What is 1 + 1?"), assistant("Two.")], []),
]

# Fixture -> the schema that is detected, and its samples: messages, and the scans that are their images.
EXPECTED = {
    "messages": ("messages", QUESTIONS),
    "messages_openai": ("messages", QUESTIONS),
    "messages_trl": ("messages", QUESTIONS),
    "messages_llava_mix": ("messages", QUESTIONS),
    "messages_two_images": ("messages", TWO_IMAGES),
    "llava": ("llava", QUESTIONS),
    "sharegpt": ("sharegpt", [asked(*fact, system("Be brief.")) for fact in FACTS]),
    "alpaca": ("alpaca", QUESTIONS),
    "prompt_completion": ("prompt_completion", QUESTIONS),
    "vqa": ("vqa", QUESTIONS),
    "vqa_mapped": ("vqa", QUESTIONS),
    "cauldron": ("cauldron", QUESTIONS),
    "caption": ("caption", CAPTIONS),
    "mimicit": ("mimicit", IN_CONTEXT),
    "interleaved_mmc4": ("interleaved", INTERLEAVED),
    "interleaved_obelics": ("interleaved", INTERLEAVED),
    "preference": ("preference", QUESTIONS),
    "preference_text": ("preference", QUESTIONS),
    "unpaired_preference": ("unpaired_preference", QUESTIONS),
    "json_object": ("vqa", QUESTIONS),
    "csv_captions": ("caption", CAPTIONS),
    "tsv_questions": ("vqa", QUESTIONS),
    "jsonl_base64": ("vqa", QUESTIONS),
    "jsonl_streamed": ("messages", QUESTIONS),
    "parquet_bytes": ("vqa", QUESTIONS),
    "parquet_streamed": ("vqa", QUESTIONS),
    "arrow": ("vqa", QUESTIONS),
    "saved_dataset": ("vqa", QUESTIONS),
    "dataset_folder": ("vqa", QUESTIONS),
    "hub": ("vqa", QUESTIONS),
    "imagefolder_jsonl": ("caption", CAPTIONS),
    "imagefolder_csv": ("caption", CAPTIONS),
    "imagefolder_classes": (
        "caption",
        sorted(CAPTIONS, key=lambda sample: sample[0][0]["content"][1]["text"]),
    ),
    "tar_captions": ("caption", CAPTIONS),
    "tar_compressed": ("caption", CAPTIONS),
    "tar_shards": ("caption", CAPTIONS),
    "tar_mmc4": ("interleaved", INTERLEAVED),
    "tar_mmc4_files": ("interleaved", INTERLEAVED),
}
VIDEOS = {"frames", "video"}
NOT_INDEXED = {"jsonl_streamed", "parquet_streamed", "tar_compressed", "tar_shards"}


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_every_fixture_has_expected_samples():
    assert {*FIXTURES} == {*EXPECTED} | VIDEOS


@pytest.mark.parametrize("name", EXPECTED)
def test_a_source_gives_the_expected_samples(tmp_path, name):
    source = opened(FIXTURES[name](tmp_path))
    schema, expected = EXPECTED[name]
    samples = samples_of(source)
    assert source.format == schema
    assert [sample.messages for sample in samples] == [messages for messages, _ in expected]
    for sample, (_, scans) in zip(samples, expected, strict=True):
        assert len(sample.images) == len(scans)
        for medium, scan in zip(sample.images, scans, strict=True):
            (image,) = open_medium(medium, sample.where)
            assert image.mode == "RGB" and (pixels(image) == pixels(Image.open(SCANS / scan))).all()


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_by_number_equal_the_rows_in_order_after_pickling_too(tmp_path, name):
    entry = FIXTURES[name](tmp_path)
    source = opened(entry)
    in_order = samples_of(source)
    assert source.indexed == (name not in NOT_INDEXED)
    copy = pickle.loads(pickle.dumps(source))
    assert samples_of(copy) == in_order
    assert samples_of(opened({**entry, "streaming": True})) == in_order
    if source.indexed:
        assert len(copy) == len(in_order)
        numbers = random.Random(0).sample(range(len(copy)), len(copy))
        assert [copy.sample(i, copy.raw(i)) for i in numbers] == [in_order[i] for i in numbers]


@pytest.mark.parametrize(
    "name", ["messages", "csv_captions", "tar_captions", "parquet_bytes", "tar_shards", "llava"]
)
def test_a_limit_keeps_the_first_rows(tmp_path, name):
    entry = FIXTURES[name](tmp_path)
    source = opened({**entry, "limit": 2})
    assert samples_of(source) == samples_of(opened(entry))[:2]
    assert not source.indexed or len(source) == 2


def test_a_pair_has_its_rejected_answer(tmp_path):
    for name in ("preference", "preference_text"):
        samples = read_samples(DataSource(**FIXTURES[name](tmp_path)))
        assert [sample.rejected for sample in samples] == [[assistant("Zero.")]] * 3


def test_a_labelled_answer_has_its_label(tmp_path):
    samples = read_samples(DataSource(**FIXTURES["unpaired_preference"](tmp_path)))
    assert [sample.label for sample in samples] == [True, False, True]


def test_the_shared_beginning_of_both_answers_is_the_prompt(tmp_path):
    prompt = [{"role": "user", "content": "Hi."}]
    answers = {word: [*prompt, {"role": "assistant", "content": word}] for word in ("Yes.", "No.")}
    (sample,) = read_samples(
        DataSource(**jsonl(tmp_path, [{"chosen": answers["Yes."], "rejected": answers["No."]}]))
    )
    assert (sample.messages, sample.rejected) == ([user("Hi."), assistant("Yes.")], [assistant("No.")])


def test_a_list_of_frames_is_a_video_with_one_marker(tmp_path):
    (sample,) = read_samples(DataSource(**FIXTURES["frames"](tmp_path)))
    assert sample.messages[0] == user(IMAGE, "Which digits are these?")
    assert sample.images == [Video(frames=tuple(str(tmp_path / scan) for scan, _ in FACTS))]
    assert len(open_medium(sample.images[0], video_frames=8)) == 3
    (middle,) = open_medium(sample.images[0], video_frames=1)
    assert (pixels(middle) == pixels(Image.open(SCANS / FACTS[1][0]))).all()


def test_frames_of_a_video_file_are_evenly_spaced(tmp_path):
    (sample,) = read_samples(DataSource(**FIXTURES["video"](tmp_path)))
    assert sample.messages[0] == user(IMAGE, "Which digits are these?")
    frames = open_medium(sample.images[0], video_frames=4)
    shown = [pixels(Image.open(SCANS / FACTS[i % 3][0]).convert("RGB").resize((64, 64))) for i in range(4)]
    for frame, scan in zip(frames, shown, strict=True):
        assert np.abs(pixels(frame).astype(int) - scan.astype(int)).mean() < 12  # the codec is lossy
    assert len(open_medium(sample.images[0], video_frames=100)) == 16


def test_the_line_break_next_to_llavas_marker_is_removed(tmp_path):
    for value, expected in [
        ("<image>\nWhat?", (IMAGE, "What?")),
        ("What?\n<image>", ("What?", IMAGE)),
        ("A\nB <image>\n C", ("A\nB ", IMAGE, " C")),
    ]:
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "That."}]
        row = {"image": str(SCANS / FACTS[0][0]), "conversations": turns}
        entry = jsonl(tmp_path, [row]) | {"image_root": str(SCANS)}
        assert read_samples(DataSource(**entry))[0].messages[0] == user(*expected)


def test_a_marker_inside_typed_text_stays_text(tmp_path):
    content = [{"type": "text", "text": "Type <image> here."}]
    answer = [{"type": "text", "text": "<image>"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    (sample,) = read_samples(DataSource(**jsonl(tmp_path, [row])))
    assert sample.messages == [user("Type <image> here."), assistant("<image>")] and sample.images == []


def test_blocks_with_and_without_an_image_of_their_own_are_combined_in_order(tmp_path):
    """Blocks with an image of their own, and blocks that take the next of ``images``."""
    for scan, _ in FACTS:
        (tmp_path / scan).write_bytes((SCANS / scan).read_bytes())
    names = [scan for scan, _ in FACTS]
    content = [
        {"type": "image", "image": names[2]},
        {"type": "image"},
        {"type": "text", "text": "?"},
        {"type": "image"},
    ]
    row = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "!"}],
        "images": names[:2],
    }
    (sample,) = read_samples(DataSource(**jsonl(tmp_path, [row])))
    assert sample.images == [str(tmp_path / name) for name in (names[2], names[0], names[1])]


def test_rows_of_a_pattern_are_numbered_in_each_file(tmp_path):
    source = opened(FIXTURES["tar_shards"](tmp_path))
    shards = tmp_path / "shards"
    expected = [
        f"{shards / '000.tar'}: row 0",
        f"{shards / '000.tar'}: row 1",
        f"{shards / '001.tar'}: row 0",
    ]
    assert [sample.where for sample in samples_of(source)] == expected
    by_number = opened({"path": str(shards / "*.tar")})
    assert [by_number.sample(i, by_number.raw(i)).where for i in range(3)] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_row_fails_alone(tmp_path, streaming):
    good = json.dumps({"question": "Q?", "answer": "A."}).encode()
    bad = [b'{"question": "\xff"}', b"{", b'{"question": "Q?"}', b"null"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, *bad, b" ", good]))
    (tmp_path / "x.csv").write_bytes(
        b'question,answer\nQ?,A.\nQ?\nQ?,A.,more\n"Q,\xff",A.\nQ?,\n"Q,?","A\n."\n"open,A.\n'
    )
    for name, expected in [("x.jsonl", "gbbbbg"), ("x.csv", "gbbbbgb")]:
        source = opened({"path": str(tmp_path / name), "streaming": streaming})
        result = ""
        for index, raw in enumerate(source.stream()):
            try:
                source.sample(index, raw)
                result += "g"
            except UserError as error:
                assert f"{name}: row {index}: " in str(error) and "\n" not in str(error)
                result += "b"
        assert result == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_was_cut_off_keeps_its_first_rows(tmp_path, streaming):
    path = write_tar(tmp_path / "x.tar", FACTS)
    path.write_bytes(path.read_bytes()[:2500])
    source = opened({"path": str(path), "streaming": streaming})
    first, last = source.stream()
    assert source.sample(0, first).messages == CAPTIONS[0][0]
    with pytest.raises(UserError, match="row 1: not a readable tar"):
        source.sample(1, last)


def test_a_file_that_changes_after_it_was_opened_raises(tmp_path):
    entry = FIXTURES["messages"](tmp_path)
    source = opened(entry)
    path = tmp_path / "data.jsonl"
    path.write_bytes(path.read_bytes()[:10])
    for reader in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(UserError, match="changed since the run began"):
            reader.raw(2)


def where_of(source, index: int) -> str:
    return source.sample(index, source.raw(index)).where


@pytest.mark.parametrize("name", ["messages", "csv_captions", "tar_captions", "parquet_bytes", "mimicit"])
def test_a_source_is_read_by_several_processes_at_once(tmp_path, name):
    source = opened(FIXTURES[name](tmp_path))
    here = [where_of(source, index % 3) for index in range(12)]  # so the file is open in this process
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(where_of, [(source, index % 3) for index in range(12)]) == here


def test_an_opened_file_takes_eight_bytes_of_memory_per_row(tmp_path):
    """Only the offset of each row is held in memory."""
    line = json.dumps({"question": "Q?", "answer": "A." * 200}).encode() + b"\n"
    path = tmp_path / "x.jsonl"
    path.write_bytes(line * 100_000)
    source = opened({"path": str(path)})
    assert len(source) == 100_000 and len(pickle.dumps(source)) < 100_000 * 8 + 10_000
    assert source.sample(99_999, source.raw(99_999)).where.endswith("row 99999")
    streamed = opened({"path": str(path), "streaming": True})
    assert len(pickle.dumps(streamed)) < 10_000 and len([*islice(streamed.stream(), 10)]) == 10
