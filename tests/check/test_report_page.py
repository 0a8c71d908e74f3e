"""The page shows which tokens are in the loss, and text in the data cannot act on the page."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flamingo_ft.check.check_report import Distribution
from flamingo_ft.check.report_builder import RowTable, find_duplicates
from flamingo_ft.check.report_page import token_previews
from flamingo_ft.check.row_inspector import RowResult
from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data import open_source
from flamingo_ft.data.encode import IGNORED, encode
from flamingo_ft.model.processor import CHUNK_TEMPLATE
from tests.check.small_recipes import asked, checked, write_rows
from tests.data.dialogues import CHATML, nano_processor
from tests.data.test_bad_data import SCAN

MARKUP = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; <|im_end|> {{ 7 * 7 }} é日🙂\u202e\nend"
)


class Page(HTMLParser):
    """Elements with their attributes, and the text of each token."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.tokens, self.words = [], [], ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self._inside = tag == "span" and "title" in attributes
        if self._inside:
            self.tokens.append((int(attributes["title"].split()[0]), {*attributes["class"].split()}, ""))

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.words += data
        if self._inside:
            number, classes, text = self.tokens[-1]
            self.tokens[-1] = (number, classes, text + data)


@pytest.fixture
def page(tmp_path):
    """The page of a source whose sample, file name and bad row contain HTML, and the path of the file."""
    name = "<b onclick=alert(3)>.jsonl"
    (tmp_path / "a.png").write_bytes(SCAN)
    rows = [
        asked(f"<image>{MARKUP}", MARKUP, ("a.png",), task=MARKUP),
        asked("?", "A", ("<svg onload=alert(4)>.png",)),
    ]
    entry = write_rows(tmp_path / name, rows)
    checked(tmp_path, [entry], on_bad_sample="skip", max_bad_share=1)
    return Page((tmp_path / "check" / "check.html").read_text(encoding="utf-8")), entry["path"]


def test_user_text_is_escaped(page):
    shown, path = page
    tags = Counter(tag for tag, _ in shown.elements)
    assert not {"script", "svg", "b onclick", "iframe", "a", "link"} & {*tags}
    for _, attributes in shown.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:image/") or "src" not in attributes
    assert "<script>alert(1)</script>" in shown.words and "<svg onload=alert(4)>.png" in shown.words
    assert "<b onclick=alert(3)>.jsonl" in shown.words
    metas = (attributes for tag, attributes in shown.elements if tag == "meta")
    policy = next(meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_highlighted_tokens_are_those_with_labels(page):
    shown, path = page
    encoded = encode(nano_processor(), first_sample(path))
    assert [number for number, _, _ in shown.tokens] == encoded.input_ids
    assert ["learned" in classes for _, classes, _ in shown.tokens] == [
        label != IGNORED for label in encoded.labels
    ]
    assert [text for _, classes, text in shown.tokens if "media" in classes] == ["<image> 1"]
    learned_text = "".join(text for _, classes, text in shown.tokens if "learned" in classes and text != "·")
    assert learned_text.replace("⏎\n", "\n") == f"{MARKUP}<|im_end|>"


def first_sample(path):
    entry = DataSource(path=path)
    source = open_source(entry, DataSection(train=(entry,)))
    return source.sample(0, source.raw(0))


@pytest.mark.parametrize("template", [None, CHATML, CHUNK_TEMPLATE], ids=["own", "chatml", "chunk"])
@given(question=st.text(min_size=1).filter(str.strip), answer=st.text(min_size=1).filter(str.strip))
@settings(max_examples=20, deadline=None)
def test_token_texts_join_to_the_decoded_text(template, question, answer):
    processor = nano_processor(template)
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    encoded = encode(processor, messages)
    tokens = token_previews(processor, encoded.input_ids, encoded.labels)
    whole = processor.tokenizer.decode(
        encoded.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert "".join(token.text for token in tokens) == whole
    assert [token.id for token in tokens] == encoded.input_ids


@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), max_size=3)), max_size=30),
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), max_size=3)), max_size=10),
)
@settings(max_examples=100, deadline=None)
def test_duplicates_equal_a_plain_count(train, evaluation):
    table = RowTable()
    for source, rows in ((0, train), (1, evaluation)):
        for row, (content, media) in enumerate(rows):
            table.add(RowResult(source, 0, row, digest=content, media_digests=media))
    result = find_duplicates(table, train_sources=1)
    contents = Counter(content for content, _ in train)
    assert result.copies == sum(times - 1 for times in contents.values())
    sizes = sorted((times for times in contents.values() if times > 1), reverse=True)
    assert [group.size for group in result.copy_groups] == sizes
    assert result.leaked == sum(content in contents for content, _ in evaluation)
    train_media = {medium for _, media in train for medium in media}
    assert result.leaked_media == sum(bool(train_media & {*media}) for _, media in evaluation)
    times = Counter(medium for _, media in (*train, *evaluation) for medium in media)
    assert result.media == len(times)
    assert result.repeated_media == sum(count > 1 for count in times.values())


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=50))
def test_a_histogram_counts_every_number_in_bins_of_whole_numbers(values):
    result = Distribution.of(np.array(values))
    assert sum(result.counts) == len(values) and len(result.counts) <= 40
    assert (result.least, result.most) == (min(values), max(values))
    assert result.mean == pytest.approx(sum(values) / len(values)) and result.median == np.median(values)
    widths = {round(b - a, 6) for a, b in zip(result.edges, result.edges[1:], strict=False)}
    assert len(widths) == 1 and all(edge % 1 == 0.5 for edge in result.edges)


def test_histograms_are_files_beside_the_page_and_embedded_in_it(tmp_path):
    checked(tmp_path, [write_rows(tmp_path / "x.jsonl", [asked("?", "A")])])
    names = {path.name for path in (tmp_path / "check").iterdir()}
    assert names == {
        "check.html",
        "check.json",
        "problems.jsonl",
        "text_tokens.png",
        "images.png",
        "loss_share.png",
    }
    for name in ("text_tokens.png", "images.png", "loss_share.png"):
        assert Image.open(tmp_path / "check" / name).size > (300, 200)
    page = Page((tmp_path / "check" / "check.html").read_text(encoding="utf-8"))
    sources = [attributes.get("src", "") for _, attributes in page.elements]
    assert sum(source.startswith("data:image/png") for source in sources) == 3
