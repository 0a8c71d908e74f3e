"""No column of a task is dropped silently, and column names match in any case."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import open_source
from flamingo_ft.errors import UserError

from .dialogues import IMAGE, assistant, user
from .fixtures import FACTS, put

ASK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, FACTS[0][0])
    (tmp_path / FACTS[0][0]).rename(tmp_path / "a.png")
    return tmp_path


def write(folder, content, name="x.csv") -> dict:
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    (folder / name).write_text(text, encoding="utf-8")
    return {"path": str(folder / name)}


def opened(entry):
    source = DataSource(**entry)
    return open_source(source, DataSection(train=(source,)))


def read(entry) -> list:
    source = opened(entry)
    return [source.sample(index, raw) for index, raw in enumerate(source.stream())]


def refusal(entry) -> str:
    with pytest.raises(UserError) as caught:
        read(entry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


VQA = {"question": "What?", "answer": "That.", "image": "a.png"}
LOST = {
    "question beside label": ({"image": "a.png", "question": "Q?", "label": "A"}, "question"),
    "question beside caption": ({"image": "a.png", "Question": "Q?", "caption": "A"}, "Question"),
    "query beside label": ({"image": "a.png", "query": "Q?", "label": "A"}, "query"),
    "label beside caption": ({"image": "a.png", "caption": "A", "label": 3}, "label"),
    "text beside caption": ({"image": "a.png", "caption": "A", "text": "B"}, "text"),
    "captions beside caption": ({"image": "a.png", "caption": "A", "captions": ["B"]}, "captions"),
    "choices of a question": ({**VQA, "choices": ["A", "B"]}, "choices"),
    "numbered options": ({**VQA, "option_a": "A", "option_b": "B"}, "option_a"),
    "options named by letters": ({**VQA, "A": "red", "B": "blue"}, "A"),
    "options that are numbers": ({**VQA, "A": "1", "B": "2"}, "A"),
    "hypothesis beside label": ({"image": "a.png", "hypothesis": "H", "label": "L"}, "hypothesis"),
    "statement beside label": ({"image": "a.png", "statement": "S", "label": "L"}, "statement"),
    "context": ({**VQA, "context": "C"}, "context"),
    "rationale": ({**VQA, "rationale": "R"}, "rationale"),
    "history of alpaca": ({"instruction": "I", "output": "O", "history": [["Q", "A"]]}, "history"),
    "system beside messages": ({"messages": ASK, "system": "S"}, "system"),
    "label of KTO": ({"messages": ASK, "label": False}, "label"),
    "rejected_response": ({"messages": ASK, "rejected_response": "R"}, "rejected_response"),
    "audio": ({"messages": ASK, "audios": ["a.wav"]}, "audios"),
    "a second image": ({**VQA, "image_2": "b.png"}, "image_2"),
    "an image by another name": ({"question": "Q?", "answer": "A", "img": "a.png"}, "img"),
    "an image's path": ({"question": "Q?", "answer": "A", "where": "photos/a.JPG"}, "where"),
    "an image's name": ({"question": "Q?", "answer": "A", "img_id": 1, "img_name": "a.png"}, "img_name"),
    "an image's number": ({"question": "Q?", "answer": "A", "image_id": 42}, "image_id"),
}


@pytest.mark.parametrize(("row", "column"), LOST.values(), ids=LOST)
def test_a_column_that_looks_like_part_of_the_task_is_never_dropped_silently(folder, row, column):
    entry = write(folder, [row], "x.jsonl")
    message = refusal(entry)
    assert message.startswith(f"{entry['path']}: row 0: {column}: looks like ") and "columns" in message
    schema = message.rpartition("or set format: ")[2].partition(" ")[0]
    (sample,) = read({**entry, "format": schema})
    assert column in opened({**entry, "format": schema}).unread or not isinstance(row[column], (str, list))
    assert column in sample.unread or not isinstance(row[column], (str, list))


def test_a_csv_of_questions_and_labels_is_refused_until_columns_maps_them(folder):
    for answer in ("label", "caption"):
        entry = write(folder, f"image,question,{answer}\na.png,What?,That.\n")
        assert "row 0: question: looks like part of the task, but format caption" in refusal(entry)
        assert (
            f"set columns: {{question: question, answer: {answer}}} to train on it as a question"
            in refusal(entry)
        )
        (sample,) = read({**entry, "columns": {"question": "question", "answer": answer}})
        assert sample.messages == [user(IMAGE, "What?"), assistant("That.")] and sample.unread == ()


def test_a_row_with_more_columns_than_the_first_is_refused_alone(folder):
    source = opened(write(folder, [VQA, {**VQA, "choices": ["A"]}, {**VQA, "choices": []}], "x.jsonl"))
    first, second, third = source.stream()
    assert source.sample(0, first) and source.sample(2, third)
    with pytest.raises(UserError, match="row 1: choices: looks like part of the task"):
        source.sample(1, second)


METADATA = {
    "VQAv2": {
        "image": "a.png", "question": "Q?", "question_id": 1, "question_type": "is", "image_id": 3,
        "answer_type": "yes/no", "multiple_choice_answer": "yes",
        "answers": [{"answer": "yes", "answer_id": 1}],
    },
    "LLaVA": {
        "id": "row 7", "image": "a.png", "model": "m",
        "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
    },
    "img2dataset": {
        "image": "a.png", "url": "http://x/y.jpg", "key": "k0", "caption": "A", "text": "A", "width": 4,
    },
    "a repeated prompt": {"prompt": "What?", "prompt_id": "x", "messages": ASK},
    "pandas' index": {"": 0, "image": "a.png", "caption": "A", "split": "train", "source": "web"},
    "nothing in them": {**VQA, "choices": None, "hint": "", "context": [], "label": {"name": None}},
}  # fmt: skip


@pytest.mark.parametrize("row", METADATA.values(), ids=METADATA)
def test_metadata_columns_of_published_datasets_are_allowed(folder, row):
    (sample,) = read(write(folder, [row], "x.jsonl"))
    texts = {name for name, value in row.items() if isinstance(value, str) and value}
    assert {*sample.unread} == texts - {"question", "answer", "image", "caption"}


def test_unread_keys_of_messages_are_listed(folder):
    block = {"type": "text", "text": "What?", "alt": "words", "text_id": 3}
    turns = [{**ASK[0], "content": [block], "language": "en", "toxic": False}, {**ASK[1], "language": "de"}]
    (sample,) = read(write(folder, [{"messages": turns}], "x.jsonl"))
    assert sample.unread == ("messages[].language", "messages[].content[].alt")


@pytest.mark.parametrize(
    "header", ["Image,Question,Answer", " image , question , answer ", "IMAGE,question,ANSWER"]
)
def test_column_names_match_in_any_case(folder, header):
    (sample,) = read(write(folder, f"{header}\na.png,What?,That.\n"))
    assert sample.messages == [user(IMAGE, "What?"), assistant("That.")] and sample.unread == ()


def test_column_names_match_in_any_case_in_every_file_format(folder):
    row = {"Image": "a.png", "QUESTION": "What?", "Answer ": "That."}
    pq.write_table(pa.Table.from_pylist([row]), folder / "x.parquet")
    (folder / "x.json").write_text(json.dumps([row]))
    for entry in (
        write(folder, [row], "x.jsonl"),
        {"path": folder / "x.json"},
        {"path": folder / "x.parquet"},
    ):
        assert read(entry)[0].messages == [user(IMAGE, "What?"), assistant("That.")]
    mapped = write(folder, "Photo,Question,Label\na.png,What?,That.\n")
    (sample,) = read({**mapped, "columns": {"image": "photo", "answer": "LABEL"}})
    assert sample.messages == [user(IMAGE, "What?"), assistant("That.")]


def test_a_byte_order_mark_is_stripped_from_column_names(folder):
    (folder / "x.csv").write_bytes("\ufeff\ufeffImage,Caption\na.png,That.\n".encode())
    assert read({"path": folder / "x.csv"})[0].images == [str(folder / "a.png")]


def test_columns_that_differ_only_in_case_are_refused(folder):
    entry = write(folder, "image,Image,caption\na.png,a.png,That.\n")
    assert "row 0: image: several columns have this name, got 'image' and 'Image'; rename one" in refusal(
        entry
    )
    (sample,) = read({**entry, "columns": {"image": "Image"}})
    assert len(sample.images) == 1
    twice = write(folder, "PHOTO,Photo,caption\na.png,a.png,That.\n")
    assert "columns: image: several columns have this name, got 'PHOTO' and 'Photo'" in refusal(
        {**twice, "columns": {"image": "photo"}}
    )


DIALECTS = {
    "semicolons": "image;question;answer\na.png;What, then?;That.\n",
    "tabs": "image\tquestion\tanswer\na.png\tWhat, then?\tThat.\n",
    "quotes": '"image";"question";"answer"\n"a.png";"What, then?";"That."\n',
    "commas in the header": "image;question;answer;note, long, very, much\na.png;What, then?;That.;\n",
    "semicolons in commas": 'image,question,answer,note; long; very; much\na.png,"What, then?",That.,\n',
    "Excel's first line": "sep=;\r\nimage;question;answer\r\na.png;What, then?;That.\r\n",
    "a blank line first": "\nimage;question;answer\na.png;What, then?;That.\n",
    "line breaks in a cell": 'image;question;answer;more\na.png;What, then?;That.;"a\n;b\n"\n',
}


@pytest.mark.parametrize("text", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_is_read_whatever_separates_its_cells(folder, text, streaming):
    (sample,) = read(write(folder, text) | {"streaming": streaming})
    assert sample.messages == [user(IMAGE, "What, then?"), assistant("That.")]


def test_the_delimiter_of_unknown_columns_is_the_one_that_fits_the_rows(folder):
    entry = write(folder, "foto;frage, kurz;antwort\na.png;Was?;Das, dort.\n")
    columns = {"image": "foto", "question": "frage, kurz", "answer": "antwort"}
    assert read({**entry, "columns": columns})[0].messages == [user(IMAGE, "Was?"), assistant("Das, dort.")]


def test_the_error_of_a_ragged_row_names_its_delimiter(folder):
    entry = write(folder, "image;caption\na.png;A\na.png;A;B\n")
    assert "row 1: expected 2 cells (image, caption), got 3; put text with semicolons in quotes" in refusal(
        entry
    )


UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": "[{}]",
    "loss_mask": [0, 1],
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.mark.parametrize(("column", "value"), UNSUPPORTED.items())
@pytest.mark.parametrize("schema", ["auto", "messages"])
def test_columns_that_change_the_prompt_or_the_loss_are_always_refused(folder, column, value, schema):
    entry = write(folder, [{"messages": ASK}, {"messages": ASK, column: value}], "x.jsonl") | {
        "format": schema
    }
    assert f"row 1: {column}: cannot be used, got " in refusal(entry)
    assert len(read(write(folder, [{"messages": ASK, column: type(value)()}], "x.jsonl"))) == 1


def test_numeric_cells_of_a_csv_do_not_count_as_text(folder):
    (sample,) = read(write(folder, "id,image,caption,score,author\n7,a.png,That.,-0.5e-3,Ann\n"))
    assert sample.unread == ("author",)


def test_a_single_letter_column_is_not_an_answer_option(folder):
    (sample,) = read(write(folder, [{**VQA, "a": "x"}], "x.jsonl"))
    assert sample.unread == ("a",)


def test_columns_may_change_from_row_to_row(folder):
    rows = [VQA, {name.title(): value for name, value in VQA.items()}, {**VQA, "source": "web"}, VQA]
    samples = read(write(folder, rows, "x.jsonl"))
    assert all(sample.messages == samples[0].messages and len(sample.images) == 1 for sample in samples)
    assert [sample.unread for sample in samples] == [(), (), ("source",), ()]
