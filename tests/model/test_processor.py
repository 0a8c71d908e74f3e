"""The processor: called by transformers or TRL, it returns the tensors of manual encoding."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from flamingo_ft.backbones.tower_source import NANO_FOLDER
from flamingo_ft.data.encode import encode, encode_prompt
from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import CHUNK_TEMPLATE, FlamingoProcessor
from tests.data.dialogues import CHATML, IMAGE, assistant, nano_processor, system, user


def picture(seed: int, size: tuple[int, int] = (24, 36)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


A, B, C = (picture(seed) for seed in range(3))


@pytest.fixture
def processor():
    return nano_processor()


def pixels(processor, *images):
    return torch.stack([processor.image_processor.transform(image) for image in images])


def test_the_image_transform_is_open_clips_own(processor):
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{NANO_FOLDER}")
    for image in (A, picture(3, (32, 32)), picture(4, (300, 41))):
        assert torch.equal(processor.image_processor.transform(image), transform(image))
    # Compared in RGB from the start: OpenCLIP would resize a palette's indices.
    for mode in ("L", "P", "RGBA", "CMYK"):
        image = A.convert(mode)
        assert torch.equal(processor.image_processor.transform(image), transform(image.convert("RGB")))


def test_the_image_processor_alone_makes_a_batch(processor):
    assert torch.equal(processor.image_processor([A, B])["pixel_values"], pixels(processor, A, B))
    assert torch.equal(processor.image_processor(A)["pixel_values"], pixels(processor, A))


def test_images_are_assigned_in_the_order_of_the_markers(processor):
    texts = ["<image> and <image>", "nothing", "one <image>"]
    flat = processor(images=[A, B, C], text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[[A, B], [], [C]], text=texts, padding=True, return_tensors="pt")
    assert flat.keys() == nested.keys() == {"input_ids", "attention_mask", "pixel_values"}
    for name in flat:
        assert torch.equal(flat[name], nested[name])
    assert flat["pixel_values"].shape == (3, 2, 3, 32, 32)
    assert torch.equal(flat["pixel_values"][0], pixels(processor, A, B))
    assert torch.equal(flat["pixel_values"][2, 0], pixels(processor, C)[0])
    assert not flat["pixel_values"][1].any() and not flat["pixel_values"][2, 1].any()
    assert (flat["input_ids"] == processor.image_token_id).sum(1).tolist() == [2, 0, 1]


def test_a_single_image_and_text_need_no_lists(processor, tmp_path):
    A.save(tmp_path / "a.png")
    expected = processor(images=[[A]], text=["see <image>"], return_tensors="pt")
    for image in (A, [A], tmp_path / "a.png", str(tmp_path / "a.png"), [tmp_path / "a.png"]):
        actual = processor(images=image, text="see <image>", return_tensors="pt")
        assert torch.equal(actual["pixel_values"], expected["pixel_values"])
        assert torch.equal(actual["input_ids"], expected["input_ids"])


def test_text_without_images_is_the_tokenizers_own(processor):
    texts = ["a longer text", "short"]
    for options in ({}, {"padding": True}, {"padding": True, "padding_side": "left"}):
        assert processor(text=texts, **options).data == processor.tokenizer(texts, **options).data
    actual = processor(text=texts, padding=True, return_tensors="pt")
    assert all(isinstance(value, torch.Tensor) for value in actual.values())
    assert actual["input_ids"].tolist() == processor.tokenizer(texts, padding=True)["input_ids"]


def test_tokenizer_arguments_may_be_grouped(processor):
    flat = processor(text=["a b", "c"], padding="max_length", max_length=9, padding_side="left")
    options = {
        "text_kwargs": {"max_length": 9, "padding_side": "left"},
        "common_kwargs": {"padding": "max_length"},
    }
    assert flat.data == processor(text=["a b", "c"], **options).data
    assert [len(row) for row in flat["input_ids"]] == [9, 9]


@pytest.mark.parametrize(
    ("images", "text", "complaint"),
    [
        (None, "a <image>", "text 0 has 1 <image> markers but 0 images"),
        (A, "a", "text 0 has 0 <image> markers but 1 image"),
        ([A, B], "a <image>", "text 0 has 1 <image> markers but 2 images"),
        ([A], ["<image>", "<image>"], "2 texts have 2 <image> markers but 1 image"),
        ([[A], [B]], ["<image>", "a"], "text 1 has 0 <image> markers but 1 image"),
        ([[], [B]], ["<image>", "<image>"], "text 0 has 1 <image> markers but 0 images"),
        ([[A], [B]], ["<image>"], "got 2 lists of images for 1 texts"),
        ([[A]], ["<image>", "<image>"], "got 1 lists of images for 2 texts"),
        ([A], None, "processor: got images without text"),
    ],
)
def test_images_that_do_not_match_the_markers_are_refused(processor, images, text, complaint):
    with pytest.raises(UserError, match=f"^{complaint}; [^\n]+$"):
        processor(images=images, text=text)


def test_a_marker_lost_to_truncation_is_refused(processor):
    options = {"truncation": True, "max_length": 4}
    with pytest.raises(UserError, match="text 0 has 2 <image> markers but 1 after tokenization"):
        processor(images=[A, B], text="<image> a b c d <image>", **options)
    kept = processor(images=[A, B], text="<image><image> a b c d", return_tensors="pt", **options)
    assert kept["input_ids"].shape == (1, 4)


TURNS = [
    system("Be brief."),
    user("Is ", {"type": "image", "image": A}, " like ", {"type": "image", "image": B}, "?"),
    assistant("No."),
    user("Why?"),
    assistant("Colour."),
]
TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs <image> like <image>?<|im_end|>\n"
    "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nColour.<|im_end|>\n"
)
WHOLE = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}


def test_the_chat_template_writes_typed_blocks_as_text(processor):
    assert processor.apply_chat_template(TURNS) == TEXT
    short = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHo.<|im_end|>\n"
    assert processor.apply_chat_template([TURNS, [user("Hi."), assistant("Ho.")]]) == [TEXT, short]
    plain = [
        {"role": "user", "content": "<image>?"},
        {"role": "assistant"},
        {"role": "assistant", "content": None},
    ]
    assert processor.apply_chat_template(plain[:1], add_generation_prompt=True).startswith(
        "<|im_start|>user\n<image>?<|im_end|>"
    )
    assert processor.apply_chat_template(plain).count("<|im_start|>assistant\n<|im_end|>") == 2


def test_the_chat_template_leaves_the_conversation_as_it_was(processor):
    turns = [user({"type": "image", "image": A}, "What?"), assistant("That.")]
    processor.apply_chat_template(turns, **WHOLE)
    assert turns == [user({"type": "image", "image": A}, "What?"), assistant("That.")]


def test_tokenized_chat_templates_equal_manual_encoding(processor):
    actual = processor.apply_chat_template(TURNS, **WHOLE)
    by_hand = encode(processor, TURNS)
    assert actual["input_ids"].tolist() == [by_hand.input_ids]
    labels = torch.where(actual["assistant_masks"].bool(), actual["input_ids"], -100)
    assert labels.tolist() == [by_hand.labels]
    assert torch.equal(actual["pixel_values"], pixels(processor, A, B)[None])
    processed = processor(images=[A, B], text=TEXT, return_tensors="pt")
    assert all(torch.equal(actual[name], processed[name]) for name in processed)


@pytest.mark.parametrize("key", ["image", "path", "url", "image_url", "base64"])
def test_images_in_blocks_may_be_files(processor, tmp_path, key):
    file = str(tmp_path / "a.png")
    A.save(file)
    block = {"type": "image", key: file}
    if key == "image_url":
        block = {"type": "image_url", "image_url": {"url": file}}
    actual = processor.apply_chat_template([user(block, "What?")], **{**WHOLE, "add_generation_prompt": True})
    assert torch.equal(actual["pixel_values"], pixels(processor, A)[None])
    assert actual["input_ids"][0].tolist() == encode_prompt(processor, [user(IMAGE, "What?")])


def test_each_conversation_of_a_batch_keeps_its_images(processor):
    conversations = [
        TURNS,
        [user("Hi."), assistant("Hi.")],
        [user({"type": "image", "image": C}), assistant("C.")],
    ]
    actual = processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **WHOLE)
    assert actual["pixel_values"].shape == (3, 2, 3, 32, 32)
    assert torch.equal(actual["pixel_values"][0], pixels(processor, A, B))
    assert torch.equal(actual["pixel_values"][2, :1], pixels(processor, C))
    for row, turns in enumerate(conversations):
        expected = encode(processor, turns)
        length = len(expected.input_ids)
        assert actual["input_ids"][row, :length].tolist() == expected.input_ids
        assert actual["attention_mask"][row].sum() == length


def test_a_block_of_another_type_is_refused(processor):
    with pytest.raises(UserError, match="^content block: got type 'video'; use text or image$"):
        processor.apply_chat_template([user({"type": "video", "video": "a.mp4"})])


@pytest.mark.parametrize("template", [None, CHATML, CHUNK_TEMPLATE])
def test_a_saved_processor_reloads_identically(processor, template, tmp_path):
    processor = FlamingoProcessor(
        processor.image_processor, fresh_tokenizer(processor), chat_template=template
    )
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert type(again) is FlamingoProcessor
    assert again.chat_template == processor.chat_template == (template or processor.tokenizer.chat_template)
    assert again.image_token_id == processor.image_token_id
    inputs = {
        "images": [A, B],
        "text": ["<image> one", "two <image> é世🦩"],
        "padding": True,
        "return_tensors": "pt",
    }
    first, second = processor(**inputs), again(**inputs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fresh_tokenizer(processor, **changes):
    tokenizer = type(processor.tokenizer).from_pretrained(processor.tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_language_model_without_chat_template_uses_chunks(processor):
    tokenizer = fresh_tokenizer(processor, chat_template=None)
    plain = FlamingoProcessor(processor.image_processor, tokenizer)
    turns = [user(IMAGE, "What?"), assistant("That."), user(IMAGE, "And?"), assistant("This.")]
    assert plain.apply_chat_template(turns) == (
        "<image>What? That.<|endofchunk|><image>And? This.<|endofchunk|>"
    )
    assert plain.apply_chat_template(turns[:1], add_generation_prompt=True) == "<image>What?"


def test_chunks_begin_with_bos_if_the_tokenizer_adds_it(processor):
    tokenizer = fresh_tokenizer(processor, chat_template=None, bos_token="<|im_start|>")
    turns = [user("What?"), assistant("That.")]
    unused = FlamingoProcessor(processor.image_processor, tokenizer)
    assert unused.apply_chat_template(turns) == "What? That.<|endofchunk|>"
    bos = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[bos]
    )
    used = FlamingoProcessor(processor.image_processor, tokenizer)
    ids = encode(used, turns).input_ids
    assert ids == tokenizer("What? That.<|endofchunk|>")["input_ids"] and ids.count(bos[1]) == 1
    assert used.apply_chat_template(turns, **WHOLE)["input_ids"][0].tolist() == ids


def test_of_several_chat_templates_the_default_is_used(processor):
    tokenizer = fresh_tokenizer(processor, chat_template={"default": CHATML, "tool_use": "{{ 'tools' }}"})
    assert FlamingoProcessor(processor.image_processor, tokenizer).chat_template == CHATML


def rows():
    """Rows of one dataset with different numbers of images, one of them without."""
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Seven."}]
    return [
        {"messages": turns, "images": [A]},
        {"messages": turns, "images": []},
        {"messages": turns, "images": [A, B, C]},
        {"messages": [user("First ", IMAGE, " then ", IMAGE), assistant("Two.")], "images": [B, C]},
    ]


def test_trls_collator_equals_manual_encoding(processor):
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    batch = collate(rows())
    assert batch["pixel_values"].shape == (4, 3, 3, 32, 32)
    assert torch.equal(batch["pixel_values"][2], pixels(processor, A, B, C))
    assert torch.equal(batch["pixel_values"][3, :2], pixels(processor, B, C))
    assert not batch["pixel_values"][1].any() and not batch["pixel_values"][0, 1:].any()
    counts = [1, 0, 3]
    expected = [[user(*[IMAGE] * count, "Which?"), assistant("Seven.")] for count in counts]
    expected.append(rows()[3]["messages"])
    for row, turns in enumerate(expected):
        by_hand = encode(processor, turns)
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == by_hand.input_ids
        assert batch["labels"][row][mask].tolist() == by_hand.labels
        assert set(batch["labels"][row][~mask].tolist()) <= {-100}


def test_trls_collator_takes_batches_without_any_image(processor):
    collate = DataCollatorForVisionLanguageModeling(processor)
    batch = collate([{"messages": rows()[0]["messages"], "images": []} for _ in range(2)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_trls_collator_takes_prompts_with_completions(processor):
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    pairs = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
        for row in rows()
    ]
    batch = collate(pairs)
    assert batch["pixel_values"].shape == (4, 3, 3, 32, 32)
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["Seven.<|im_end|>\n"] * 3 + ["Two.<|im_end|>\n"]
