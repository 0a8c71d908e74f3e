"""A model whose answers end early and depend on the image, on disk as an adapter and merged."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.switched_off import base_bridge
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.evaluation.merging import merge_adapter
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.model import build_flamingo

PROMPT = "Which digit is this?"


def make_flamingo():
    """Return a Flamingo of nano backbones and a random bridge; its generation config samples."""
    torch.manual_seed(0)
    small = {"heads": 2, "dim_head": 8}
    language = load_language("nano")
    language.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model, processor = build_flamingo(
        load_vision("nano"),
        language,
        perceiver={"num_latents": 2, "depth": 1, **small},
        cross_attention=small,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("perceiver.", "gated_cross_attn_layers.")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), processor


@torch.no_grad()
def end_in_the_middle(model, processor, paths) -> None:
    """Make the end of a chunk, which is no end token of the language model, likelier than a late token."""
    head, rows = model.lang_encoder.get_output_embeddings().weight, model.token_rows.output.weight
    words = Predictor(model, processor)(paths[0], PROMPT)
    tokens = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    end = model.token_rows.token_ids.index(model.config.eoc_token_id)
    rows[end] = 1.01 * head[next(token for token in tokens if token not in tokens[:4])]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with an adapter and what it is merged to, and two images."""
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    model, processor = make_flamingo()
    end_in_the_middle(model, processor, paths)
    save_adapter(model, processor, folder / "adapter")
    merge_adapter(folder / "adapter", folder / "merged", dtype=torch.float32)
    return folder, paths


@dataclass(frozen=True)
class DemoPage:
    """A demo's page that is served at ``url``, and what it shows: a model with an adapter."""

    url: str
    model: Any
    bridge: Any
    images: list[Path]

    @property
    def predictor(self) -> Predictor:
        return self.model.predictor


@contextmanager
def served_demo(folder, images=(), examples=(), **options):
    """Serve the page of an adapter on a free port inside the block. options: of the predictor."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'flamingo_ft[demo]'")
    from flamingo_ft.inference.demo.page import build_page
    from flamingo_ft.inference.demo.serving import private_folder, serve_page
    from flamingo_ft.inference.demo.switchable_model import SwitchableModel

    predictor = Predictor.from_pretrained(folder, **options)
    bridge = base_bridge(folder, predictor.model)
    model = SwitchableModel(predictor, bridge)
    with private_folder():
        page = build_page(model, str(folder.name), examples)
        serve_page(page, "127.0.0.1")
        try:
            yield DemoPage(page.local_url, model, bridge, list(images))
        finally:
            page.close(verbose=False)


@pytest.fixture(scope="module")
def demo_page(folders):
    """The page of the adapter, with an example."""
    folder, images = folders
    example = {"text": PROMPT, "files": [str(images[0])]}
    with served_demo(folder / "adapter", images, [example], max_new_tokens=6) as page:
        yield page
