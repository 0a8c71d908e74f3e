import pytest
import torch

from flamingo_ft.adapters import set_trainable
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import TrainableSection
from flamingo_ft.model import build_flamingo

PERCEIVER = {"num_latents": 3, "depth": 1, "heads": 2, "dim_head": 8}


@pytest.fixture(scope="session")
def make_model():
    """A maker of small Flamingos around the nano backbones, their whole bridge random and trainable."""

    def make(seed: int = 0, **trainable):
        torch.manual_seed(seed)
        model, processor = build_flamingo(load_vision("nano"), load_language("nano"), perceiver=PERCEIVER)
        set_trainable(model, TrainableSection(**trainable))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("perceiver.", "gated_cross_attn_layers.", "token_rows.")):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.eval(), processor

    return make
