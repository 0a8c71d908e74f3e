"""Where an answer looks: its answer and weights are those of generation, and its figure shows them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from flamingo_ft import cli
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.backbones.visual_tokens import spatial_tokens
from flamingo_ft.config.library import library_folder
from flamingo_ft.data.sample import Video, display_text
from flamingo_ft.errors import UserError
from flamingo_ft.inference.look import token_texts
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import build_flamingo
from flamingo_ft.model.attention_maps import attention_maps, record_attention
from flamingo_ft.model.tiles import Tiling

from .conftest import PROMPT, make_flamingo

BOTH = "First <image> then <image>. Name both."
GRID = (8, 8)  # of the nano tower
DIGITS = library_folder() / "quickstart"


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*make_flamingo(), max_new_tokens=6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 32)).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in range(3)]


@pytest.fixture(scope="module")
def look(predictor, files):
    return predictor.look(files[:2], BOTH)


def test_the_answer_is_the_predictors_own_and_its_tokens_spell_it(predictor, files, look):
    assert look.answer == predictor(files[:2], BOTH)
    assert "".join(look.tokens).strip() == look.answer and len(look.tokens) == 6


def test_weights_sum_to_one_over_the_last_image_and_are_zero_on_the_one_before(look):
    layers, tokens = len(look.layers), len(look.tokens)
    assert look.weights.shape == (layers, tokens, 2, 1, *GRID) and look.weights.dtype == np.float32
    np.testing.assert_allclose(look.weights.sum((2, 3, 4, 5)), 1, rtol=1e-5)
    np.testing.assert_array_equal(look.weights[:, :, 0], 0)
    np.testing.assert_allclose(look.average, look.weights.mean(0))
    np.testing.assert_allclose(look.media_weights, np.tile([0, 1], (tokens, 1)), rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_weights_of_a_token_are_those_with_which_it_was_generated(predictor, files, look, number):
    with record_attention(predictor.model) as record:
        predictor(files[:2], BOTH, max_new_tokens=number)
    last = attention_maps(record)[:, -1].unflatten(-1, GRID).numpy()
    np.testing.assert_allclose(look.weights[:, number - 1], last, rtol=1e-3, atol=1e-6)


def test_pictures_are_the_images_as_the_tower_sees_them(files, look):
    for file, picture in zip(files, look.pictures, strict=False):
        cropped = np.asarray(Image.open(file).convert("RGB"))[:, 8:40]  # the middle square
        np.testing.assert_array_equal(picture, cropped[None])


def test_a_tokens_weights_are_a_mixture_of_what_the_latents_hold(look):
    assert look.latents.shape == (2, 2, 1, *GRID) and look.latents.dtype == np.float32
    np.testing.assert_allclose(look.latents.sum((2, 3, 4)), 1, rtol=1e-5)
    held = look.latents[1].reshape(2, -1)  # of the last image, the only one that tokens see
    for weights in look.weights[:, :, 1].reshape(-1, held.shape[1]):
        shares = np.linalg.lstsq(held.T, weights, rcond=None)[0]
        assert shares.sum() == pytest.approx(1, abs=1e-3) and (shares > 0).all()
        np.testing.assert_allclose(shares @ held, weights, atol=1e-6)


def test_a_video_has_weights_for_each_of_its_frames(predictor, files):
    video = Video(frames=tuple(map(str, files)))
    look = predictor.look([video, files[0]], BOTH)
    assert look.weights.shape[2:] == (2, 3, *GRID)
    assert [len(frames) for frames in look.pictures] == [3, 1]
    np.testing.assert_array_equal(look.weights[:, :, 1, 1:], 0)  # the image has no such frames
    alone = predictor.look(video, PROMPT)
    np.testing.assert_allclose(alone.weights.sum((2, 3, 4, 5)), 1, rtol=1e-5)
    assert (alone.weights.sum((4, 5)) > 0).all()
    look.figure()


def test_looking_leaves_the_model_as_it_was(predictor, files):
    model = predictor.model.train()
    before = [(len(m._forward_pre_hooks), m.training) for m in model.modules()]
    predictor.look(files[0], PROMPT)
    assert [(len(m._forward_pre_hooks), m.training) for m in model.modules()] == before
    model.eval()


def test_a_prompt_without_images_is_refused(predictor):
    with pytest.raises(UserError, match="look: got a prompt without images; pass at least one"):
        predictor.look(None, "Hello.")


def test_an_answer_that_ends_at_once_has_no_tokens(predictor, files, monkeypatch):
    monkeypatch.setattr(Predictor, "_generate", lambda *_: [[]])
    look = predictor.look(files[0], PROMPT)
    assert look.answer == "" and look.tokens == [] and look.weights.shape[1] == 0
    assert len(shown(look.figure())) == 1


def look_at_direction(model, direction: torch.Tensor) -> None:
    """Make every text token attend to the visual tokens that point in a direction (D,), and nothing else."""
    for block in model.gated_cross_attn_layers:
        attention = block.attn
        first = slice(None, None, attention.to_q.out_features // attention.heads)  # feature of each head
        attention.norm.weight.fill_(0)
        attention.norm.bias.fill_(1)
        attention.to_q.weight.fill_(0)
        attention.to_q.weight[first, 0] = 1
        keys, _ = attention.to_kv.weight.chunk(2)
        keys.fill_(0)
        keys[first] = 20 * direction


@torch.no_grad()
def test_a_bridge_made_to_look_at_a_white_square_is_shown_to_look_there():
    model, processor = build_flamingo(
        load_vision("nano"),
        load_language("nano"),
        perceiver={"depth": 0},
        cross_attention={"heads": 2, "dim_head": 8},
    )
    picture = Image.new("RGB", (48, 32))
    picture.paste("white", (32, 4, 36, 8))  # after the crop to the middle: row 1, column 6 of patches
    pixels = processor.image_processor.transform(picture)[None, None, None]
    tokens = spatial_tokens(model.vision_encoder, pixels[0, 0])
    normalized = model.perceiver(tokens[:, None, None])[0, 0]
    direction = normalized[8 * 1 + 6] - normalized.mean(0)
    look_at_direction(model, direction / direction.norm())
    look = Predictor(model, processor, max_new_tokens=2).look(picture, PROMPT)
    for weights in look.weights.reshape(-1, *GRID):
        assert np.unravel_index(weights.argmax(), GRID) == (1, 6) and weights.max() > 0.9
    assert (look.pictures[0][0, 4:8, 24:28] > 200).all() and look.pictures[0].mean() < 10


@pytest.mark.slow
def test_a_trained_model_looks_at_the_image_whose_digit_it_names(tmp_path):
    """With positions of images, and all of them visible: else the first is read at the text between."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, rows_of("name_both", "train"))))
    options = ("model.media_visibility=all_preceding", "model.perceiver.max_num_media=2")
    options += (f"data={{train: [{{path: {rows}, image_root: {DIGITS}}}]}}", "train.max_steps=100")
    options += ("train.batch_size=24", "train.learning_rate=4e-3", f"train.output_dir={tmp_path / 'run'}")
    assert cli.main(["train", "quickstart", *options]) == 0
    predictor = Predictor.from_pretrained(tmp_path / "run")
    first, second = [], []
    for images, prompt, answer in held_out("name_both", 40):
        look = predictor.look(images, prompt)
        if look.answer == answer:  # Three and seven.
            first.append(look.media_weights[0])
            second.append(look.media_weights[2])
            assert [token.strip() for token in look.tokens[1::2]] == ["and", "."]
    assert len(first) > 30
    assert np.mean(first, axis=0)[0] > 0.6 and np.mean(second, axis=0)[1] > 0.6


def rows_of(task: str, split: str) -> list[dict]:
    """Return the rows of a task in the quickstart's data."""
    rows = map(json.loads, (DIGITS / f"{split}.jsonl").read_text().splitlines())
    return [row for row in rows if row["task"] == task]


def held_out(task: str, count: int):
    """Yield images, prompt and answer of held-out questions of the quickstart."""
    for row in rows_of(task, "eval")[:count]:
        question, answer = row["messages"]
        images = [DIGITS / image for image in row["images"]]
        yield images, display_text(question), display_text(answer)


class Bytes:
    """A tokenizer whose tokens are the bytes of the text."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_character_in_several_tokens_is_shown_with_the_last_of_them():
    text = "né €!"
    assert token_texts(Bytes(), [*text.encode()]) == ["n", "", "é", " ", "", "", "€", "!"]
    assert "".join(token_texts(Bytes(), [*text.encode()][:-2])) == "né \N{REPLACEMENT CHARACTER}"


# The figure


def shown(figure) -> list:
    return [axes for axes in figure.axes if axes.get_title()]


def is_heat(image) -> bool:
    return image.get_array().ndim == 2


def heat(axes) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in axes.images if is_heat(image)]


def test_the_figure_has_a_panel_of_the_pictures_and_one_per_token_with_its_weights(look):
    plain, *panels = shown(look.figure())
    assert plain.get_title() == "as the tower sees it" and heat(plain) == []
    assert [panel.get_title() for panel in panels] == [token.strip() or repr(token) for token in look.tokens]
    for panel, average in zip(panels, look.average, strict=True):
        np.testing.assert_array_equal(np.stack(heat(panel)), average[:, 0])
        assert [text.get_text() for text in panel.texts] == ["image 1: 0 %", "image 2: 100 %"]


def test_the_figure_of_latents_has_a_panel_for_each_of_the_first_ones(look):
    _, *panels = shown(look.latent_figure(1))
    assert [panel.get_title() for panel in panels] == ["latent 1", "latent 2"]
    for panel, held in zip(panels, look.latents[1], strict=True):
        np.testing.assert_array_equal(np.stack(heat(panel)), held)
    assert len(shown(look.latent_figure(count=1))) == 2


def test_all_panels_and_the_bar_have_one_colour_scale(look):
    figure = look.figure(layer=look.layers[0])
    (scale,) = {image.get_clim() for axes in shown(figure)[1:] for image in axes.images if is_heat(image)}
    (bar,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("attention per patch"))
    assert bar.get_ylim() == pytest.approx(scale) and "(no colour: even, 1.6 %)" in bar.get_ylabel()


@pytest.mark.parametrize("largest, top, opacity", [(1.1, 2, 0.09), (4, 4, 0.9)])
def test_attention_is_coloured_where_it_exceeds_an_even_share_of_the_visible_image(
    look, largest, top, opacity
):
    weights = np.zeros_like(look.weights)
    weights[:, :, 1] = (1 + (largest - 1) * np.eye(*GRID)) / 64  # the first image is not visible
    for panel in shown(replace(look, weights=weights).figure())[1:]:
        for image in filter(is_heat, panel.images):
            assert image.get_clim() == pytest.approx((1 / 64, top / 64))
        hidden, visible = (
            image.to_rgba(image.get_array())[..., 3] for image in panel.images if is_heat(image)
        )
        assert not hidden.any() and visible[0, 1] == 0
        assert visible[0, 0] == pytest.approx(opacity, abs=0.01)


def test_weights_lie_on_their_own_picture(look):
    for panel in shown(look.figure())[1:]:
        extents = [tuple(image.get_extent()) for image in panel.images]
        assert sorted(extents[:2]) == sorted(extents[2:]) and extents[0][1] < extents[1][0]
        assert all(image.origin == "upper" for image in panel.images)


def test_tiles_are_drawn_as_the_image_that_they_were_cut_from():
    model, processor = make_flamingo()
    processor.image_processor.tiles = Tiling(4).to_dict()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    look = Predictor(model, processor, max_new_tokens=2).look([image, image[:32, :32]], BOTH)
    assert look.grids == [(2, 2), (1, 1)] and look.weights.shape[2:4] == (2, 5)
    np.testing.assert_allclose(look.weights.sum((2, 3, 4, 5)), 1, rtol=1e-5)
    plain, *panels = shown(look.figure())
    for panel in (plain, *panels):
        whole, *tiles, small = [image.get_extent() for image in panel.images[:6]]
        left = whole[1] + 0.06
        assert whole[:2] == [0, 1] and small[0] == pytest.approx(left + 1.06)
        for extent, (row, column) in zip(tiles, itertools.product(range(2), range(2)), strict=True):
            expected = (left + column / 2, left + (column + 1) / 2, 1 - (row + 1) / 2, 1 - row / 2)
            assert extent == pytest.approx(expected)
    shows = [np.asarray(image.get_array()) for image in plain.images[1:5]]
    np.testing.assert_array_equal(np.vstack([np.hstack(shows[:2]), np.hstack(shows[2:])]), image)


def test_texts_of_the_figure_do_not_overlap_and_stay_inside(look):
    figure = look.figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for axes in shown(figure) for text in (axes.title, *axes.texts)]
    boxes = [text.get_window_extent(renderer) for text in texts]
    width, height = figure.bbox.size
    for number, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert not any(box.padded(-1).overlaps(other.padded(-1)) for other in boxes[:number])


def test_another_layer_is_refused_and_pyplot_is_not_used(look):
    with pytest.raises(UserError, match="layer: no cross-attention before decoder layer 99; use one of 0"):
        look.figure(layer=99)
    look.figure()
    assert plt.get_fignums() == []
