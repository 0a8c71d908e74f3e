"""Several samples in one row are to each other as if each stood in a row of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flamingo_ft.data.collate import collate_packed, collate_text, pack
from flamingo_ft.data.encode import IGNORED, Encoded
from flamingo_ft.errors import UserError
from flamingo_ft.model.language_model_inputs import get_cache
from flamingo_ft.training.preflight import check_packing

from .tiny import MEDIA, ids, images, tiny_flamingo
from .tiny_language_models import make_tiny

# Documents with images in every place, text alone after images and before them.
TEXTS = ("aIbIcd", "efg", "Iabc", "hij", "kIlIm", "nI")
ROWS = ((0, 1, 2), (3, 4, 5))


def sample(text: str) -> Encoded:
    tokens = ids(text)[0].tolist()
    labels = [IGNORED if token == MEDIA or place % 3 == 1 else token for place, token in enumerate(tokens)]
    return Encoded(tokens, labels, text.count("I"))


def media_of(numbers, pixels, most):
    """The rows of media (B, most, ...) of samples, one or several to a row; ``pixels`` holds each sample's
    own.
    """
    rows = [torch.cat([pixels[number][: TEXTS[number].count("I")] for number in row]) for row in numbers]
    return torch.stack([torch.cat([row, row.new_zeros(most - len(row), *row.shape[1:])]) for row in rows])


def batches(dtype=torch.float64):
    """The same samples, each in a row of its own and packed in two rows."""
    pixels = images(len(TEXTS), 3).to(dtype)
    apart = collate_text([sample(text) for text in TEXTS], 0)
    packed = collate_packed([[sample(TEXTS[number]) for number in row] for row in ROWS], 0)
    apart["pixel_values"] = media_of([[number] for number in range(len(TEXTS))], pixels, 2)
    packed["pixel_values"] = media_of(ROWS, pixels, 3)
    return apart, packed


def gradients(model, batch, backbone: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss if not backbone else loss_from_backbone(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_from_backbone(model, batch):
    """As TRL computes it: the last hidden state times the output head."""
    labels = batch["labels"][:, 1:]
    hidden = model.base_model(
        **{name: each for name, each in batch.items() if name != "labels"}, use_cache=False
    )
    head = model.get_output_embeddings()
    logits = torch.nn.functional.linear(hidden.last_hidden_state[:, :-1], head.weight, head.bias)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("backbone", [False, True], ids=["forward", "backbone"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["immediate", "all_preceding", "following"])
@pytest.mark.parametrize("family", ["llama", "opt", "mpt"])
def test_packed_samples_have_the_loss_and_the_gradients_that_they_have_apart(
    family, mode, attention, backbone
):
    lm = make_tiny(family)
    if family != "mpt":  # it has attention of its own alone
        lm.set_attn_implementation(attention)
    exact = attention == "sdpa" and family != "mpt"  # elsewhere transformers' softmax is in float32
    relative, absolute = (1e-8, 1e-10) if exact else (1e-4, 1e-6)
    model = tiny_flamingo(lm=lm, media_visibility=mode).double().requires_grad_(True)
    apart, packed = batches()
    (loss, expected), (found_loss, found) = (gradients(model, batch, backbone) for batch in (apart, packed))
    torch.testing.assert_close(found_loss, loss, rtol=relative / 100, atol=0)
    assert found.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=relative, atol=absolute * largest, msg=name
        )


@pytest.mark.parametrize("mode", ["immediate", "all_preceding", "following"])
def test_without_document_ids_a_document_would_see_the_images_of_others(mode):
    """The law above is not true by accident."""
    model = tiny_flamingo(media_visibility=mode).double()
    _, packed = batches()
    own = model(**packed).logits
    mixed = model(
        **{name: each for name, each in packed.items() if name != "document_ids"}, use_cache=False
    ).logits
    assert (own - mixed).abs().max() > 1e-3


def test_gradients_of_packed_rows_are_the_same_with_checkpointing():
    model = tiny_flamingo().double().requires_grad_(True).train()
    _, packed = batches()
    loss, expected = gradients(model, packed, backbone=False)
    model.gradient_checkpointing_enable()
    again, found = gradients(model, packed, backbone=False)
    torch.testing.assert_close(again, loss)
    assert all(torch.allclose(found[name], expected[name]) for name in expected)


def test_packed_rows_are_refused_with_a_mask_a_cache_or_without_positions():
    model = tiny_flamingo()
    _, packed = batches(torch.float32)
    packed.pop("labels")
    cache = get_cache(model(ids("ab"), use_cache=True))
    without = {name: each for name, each in packed.items() if name != "position_ids"}
    for batch in ({**packed, "attention_mask": torch.ones_like(packed["input_ids"])}, without):
        with pytest.raises(ValueError, match="document_ids: need position_ids"):
            model(**batch)
    with pytest.raises(ValueError, match="document_ids: need position_ids"):
        model(**packed, cache=cache)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gpt2", "gptj", "mpt", "qwen2", "gemma2"])
def test_families_that_keep_documents_apart_may_be_packed(family):
    check_packing(tiny_flamingo(lm=make_tiny(family)), rows=2)


@pytest.mark.parametrize("family", ["bloom", "mamba", "roberta"])
def test_families_that_read_across_documents_are_refused(family):
    with pytest.raises(
        UserError, match=f"^data.packing: a {family} model [^\n]*; set data.packing to false[^\n]*$"
    ):
        check_packing(tiny_flamingo(lm=make_tiny(family)), rows=2)


def test_the_check_leaves_the_model_in_its_mode():
    model = tiny_flamingo()
    for training in (True, False):
        check_packing(model.train(training))
        assert model.training is training


LENGTHS = st.lists(st.integers(1, 10), max_size=40)


@given(LENGTHS, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_packing_loses_nothing_and_overfills_nothing(lengths, open_rows):
    items = list(enumerate(lengths))
    rows = list(pack(items, lambda item: item[1], 10, open_rows))
    assert sorted(item for row in rows for item in row) == items
    assert all(row and sum(size for _, size in row) <= 10 and row == sorted(row) for row in rows)
    assert rows == list(pack(iter(items), lambda item: item[1], 10, open_rows))


@given(LENGTHS)
@settings(max_examples=50, deadline=None)
def test_an_item_waits_for_a_bounded_number_of_others(lengths):
    read = []
    open_items = 0
    for row in pack((read.append(size) or size for size in lengths), lambda size: size, 10, 2):
        open_items += len(row)
        assert len(read) - open_items <= 2 * 10 or len(read) == len(lengths)


def test_small_items_fill_the_rows():
    rows = list(pack([6, 5, 4, 5, 3, 7], lambda size: size, 10))
    assert rows == [[6, 4], [5, 5], [3, 7]]


def test_an_item_that_no_row_holds_is_refused():
    with pytest.raises(ValueError, match="length 11 does not fit into a row of 10"):
        list(pack([11], lambda size: size, 10))


def test_a_packed_row_restarts_positions_and_learns_no_first_token():
    whole = Encoded([8, 9, 10, 11], [8, -100, 10, 11])
    batch = collate_packed([[Encoded([5, 6], [5, 6]), Encoded([7], [7])], [whole]], 0)
    assert {name: each.tolist() for name, each in batch.items()} == {
        "input_ids": [[5, 6, 7, 0], [8, 9, 10, 11]],
        "labels": [[-100, 6, -100, -100], [-100, -100, 10, 11]],
        "document_ids": [[0, 0, 1, -1], [0, 0, 0, 0]],
        "position_ids": [[0, 1, 0, 0], [0, 1, 2, 3]],
    }
