"""Keys of a message besides role and content: loss flags are obeyed, reasoning and tool calls are refused."""

import json

import pytest

from flamingo_ft.config import DataSource
from flamingo_ft.data import read_samples
from flamingo_ft.data.encode import IGNORED, encode
from flamingo_ft.errors import UserError

from .dialogues import IMAGE, assistant, nano_processor, user
from .fixtures import FACTS, put


def read(tmp_path, row):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    return read_samples(DataSource(path=tmp_path / "x.jsonl"))[0]


def openai(**keys) -> dict:
    answers = [{"role": "assistant", "content": "A.", **keys}, {"role": "assistant", "content": "B."}]
    question = {"role": "user", "content": "Q?"}
    return {"messages": [question, answers[0], question, answers[1]]}


def sharegpt(**keys) -> dict:
    answers = [{"from": "gpt", "value": "A.", **keys}, {"from": "gpt", "value": "B."}]
    question = {"from": "human", "value": "Q?"}
    return {"conversations": [question, answers[0], question, answers[1]]}


def mixed(**keys) -> dict:
    return {"conversations": openai(**keys)["messages"]}


ROWS = [openai, sharegpt, mixed]
WITHOUT_LOSS = [
    {"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss": 0}, {"train": False}, {"training": False},
    {"loss_scale": 0}, {"loss_weight": 0}, {"loss_mask": 0}, {"loss": False, "weight": 0},
]  # fmt: skip
WITH_LOSS = [
    {}, {"weight": 1}, {"weight": 1.0}, {"weight": None}, {"loss": True}, {"train": True},
    {"loss_scale": 1.0}, {"loss_mask": 1}, {"train_detail": None}, {"train_detail": []},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("keys", WITHOUT_LOSS)
def test_an_answer_that_a_toolkit_excludes_from_training_has_no_loss(tmp_path, row, keys):
    sample = read(tmp_path, row(**keys))
    assert [message.get("loss", True) for message in sample.messages] == [True, False, True, True]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("keys", WITH_LOSS)
def test_an_answer_that_a_toolkit_trains_on_has_loss(tmp_path, row, keys):
    assert all("loss" not in message for message in read(tmp_path, row(**keys)).messages)


def test_a_weight_of_zero_leaves_no_label(tmp_path):
    processor = nano_processor()
    whole, last = (
        encode(processor, read(tmp_path, openai(**keys))).labels for keys in ({"weight": 1}, {"weight": 0})
    )
    labelled = [processor.tokenizer.decode([t for t in labels if t != IGNORED]) for labels in (whole, last)]
    assert labelled == ["A.<|im_end|>B.<|im_end|>", "B.<|im_end|>"]


REFUSED = [
    ("weight", 0.5), ("weight", 2), ("weight", -1), ("weight", "0"), ("weight", True), ("weight", [0]),
    ("loss", "no"), ("loss", 0.5), ("train", "false"), ("loss_scale", 2.0), ("loss_scale", "last_round"),
    ("train_detail", [{"begin_offset": 0, "end_offset": 1, "train": False}]), ("mask", True),
    ("reasoning_content", "Hm."), ("reasoning", "Hm."), ("thinking", "Hm."),
    ("tool_calls", [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
    ("function_call", {"name": "f", "arguments": "{}"}), ("name", "Ann"), ("images", ["a.png"]),
    ("refusal", "No."),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_unsupported_keys_are_refused_by_name(tmp_path, row, key, value):
    with pytest.raises(UserError, match=rf"x.jsonl: row 0: (messages|conversations)\[1\]\.{key}: .*got .*; "):
        read(tmp_path, row(**{key: value}))


@pytest.mark.parametrize("value", [None, "", [], {}, {"name": None, "arguments": None}, [None]])
def test_empty_unsupported_keys_are_ignored(tmp_path, value):
    for key in ("reasoning_content", "tool_calls", "function_call", "name"):
        assert len(read(tmp_path, openai(**{key: value})).messages) == 4


def test_keys_about_loss_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"messages\[1\]: .* contradict each other, got loss True and weight 0;"
    ):
        read(tmp_path, openai(loss=True, weight=0))


def test_only_assistant_messages_can_be_trained_on(tmp_path):
    for key, value in (("weight", 0), ("weight", 1), ("loss", False), ("train", False), ("loss_scale", 1)):
        row = openai()
        row["messages"][0] = {**row["messages"][0], key: value}
        assert all("loss" not in message for message in read(tmp_path, row).messages)
    for key in ("loss", "train"):
        row["messages"][0] = {"role": "user", "content": "Q?", key: True}
        with pytest.raises(
            UserError, match=rf"messages\[0\]\.{key}: only assistant messages can be trained on, got True"
        ):
            read(tmp_path, row)


def test_tool_function_and_developer_messages_are_refused(tmp_path):
    for role in ("tool", "function", "developer"):
        row = openai()
        row["messages"].insert(2, {"role": role, "content": "4"})
        with pytest.raises(
            UserError, match=rf"messages\[2\].role: expected one of system, user, assistant, got '{role}'"
        ):
            read(tmp_path, row)


def with_block(**keys) -> dict:
    return {"messages": [{"role": "user", "content": [keys, {"type": "text", "text": "Q?"}]},
                         {"role": "assistant", "content": "A."}]}  # fmt: skip


BLOCKS = {
    "image beside text": ({"type": "text", "text": "B", "image": "a.png"}, r"\.image: not read in a block"),
    "text beside image": ({"type": "image", "image": "a.png", "text": "B"}, r"\.text: not read in a block"),
    "video beside image": (
        {"type": "image", "image": "a.png", "video": "b.mp4"},
        r"\.video: not read in a block of",
    ),
    "two images": (
        {"type": "image", "image": "a.png", "url": "b.png"},
        ": one block has two images, got image and u",
    ),
    "loss of a block": ({"type": "text", "text": "B", "weight": 0}, r"\.weight: cannot be used"),
    "reasoning": ({"type": "text", "text": "B", "reasoning": "R"}, r"\.reasoning: cannot be used"),
}


@pytest.mark.parametrize(("block", "complaint"), BLOCKS.values(), ids=BLOCKS)
def test_a_block_with_content_that_is_not_read_is_refused(tmp_path, block, complaint):
    put(tmp_path, FACTS[0][0])
    with pytest.raises(UserError, match=rf"row 0: messages\[0\]\.content\[0\]{complaint}"):
        read(tmp_path, with_block(**block))


def test_settings_of_a_block_are_ignored(tmp_path):
    scan = put(tmp_path, FACTS[0][0])
    image = {"url": scan, "detail": "low"}
    block = {"type": "image_url", "image_url": image, "text": None, "max_pixels": 1, "name": "n"}
    assert read(tmp_path, with_block(**block)).messages[0] == user(IMAGE, "Q?")


EMPTY = [[""], [None], ["", None], [" "], [{"bytes": None, "path": None}], '[""]', "", None, []]


@pytest.mark.parametrize("value", EMPTY, ids=str)
@pytest.mark.parametrize("field", ["images", "videos", "image", "video"])
def test_empty_media_fields_have_no_images(tmp_path, field, value):
    if value == '[""]' and not field.endswith("s"):
        value = [""]
    sample = read(tmp_path, {"question": "Q?", "answer": "A.", field: value})
    assert (sample.messages, sample.images) == ([user("Q?"), assistant("A.")], [])


def test_a_block_with_an_empty_image_takes_the_next_image_of_the_row(tmp_path):
    scan = put(tmp_path, FACTS[0][0])
    for empty in ("", None):
        sample = read(tmp_path, with_block(type="image", image=empty) | {"images": [scan]})
        assert sample.images == [str(tmp_path / scan)]


def test_a_null_among_images_is_refused(tmp_path):
    scan = put(tmp_path, FACTS[0][0])
    with pytest.raises(UserError, match=r"images\[1\]: expected the path of an image, got null"):
        read(tmp_path, {"question": "Q?", "answer": "A.", "images": [scan, None]})
