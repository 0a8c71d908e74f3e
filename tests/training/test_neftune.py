"""NEFTune (arXiv:2310.05914): noise on the text embeddings, in training alone."""

import pytest
import torch
from transformers import TrainerCallback

from flamingo_ft.errors import UserError
from tests import regimes

from . import methods

NOISE = "train.neftune_noise_alpha=5"


@pytest.fixture
def embedded(small_run):
    """Return the embeddings of each forward pass of a trained step with noise, and the model."""
    model, processor = regimes.build(NOISE)
    trainer = regimes.trainer(model, processor, NOISE)
    seen: list[tuple[bool, torch.Tensor, torch.Tensor]] = []

    def record(module, arguments, hidden):
        seen.append((module.training, arguments[0], hidden.detach()))

    def watch(*_, **__):  # after the noise's own hook
        trainer.model.get_input_embeddings().register_forward_hook(record)

    trainer.callback_handler.add_callback(_OnTrainBegin(watch))
    trainer.train()
    return seen, trainer


class _OnTrainBegin(TrainerCallback):
    def __init__(self, action):
        self.on_train_begin = action


def test_the_noise_is_on_every_token_of_the_text_and_within_its_bounds(embedded):
    ((training, ids, noisy), *_), trainer = embedded
    clean = trainer.model.get_input_embeddings().weight[ids].detach()
    known = ids < min(trainer.model.token_rows.token_ids)  # the others are rows of the Flamingo's own
    noise = (noisy - clean)[known]
    bound = 5 / (ids.shape[1] * clean.shape[2]) ** 0.5
    assert training and (noise != 0).all() and noise.abs().max() <= bound * (1 + 1e-5)
    assert noise.abs().max() > 0.9 * bound and not known.all()
    rows = [noisy[ids == token] for token in trainer.model.token_rows.token_ids if (ids == token).sum() > 1]
    assert rows and all((each[0] != each[1]).all() for each in rows)


def test_evaluation_and_the_trained_model_have_no_noise(embedded):
    _, trainer = embedded
    model, processor = trainer.model, trainer.processing_class
    assert torch.equal(regimes.logits(model, processor), regimes.logits(model, processor))
    assert not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")
    fresh, _ = regimes.build()
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_a_resumed_run_draws_the_same_noise(small_run):
    resumed, whole = methods.resumed_and_whole(NOISE)
    assert resumed == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.neftune_noise_alpha=-5"], "train.neftune_noise_alpha: must be more than 0, got -5"),
        ([NOISE, "train.method=dpo"], "train.neftune_noise_alpha: dpo compares probabilities"),
    ],
)
def test_bad_noise_is_refused_in_one_line(small_run, settings, message):
    with pytest.raises(UserError, match=message):
        regimes.recipe(*settings)
