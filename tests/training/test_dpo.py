"""Preference training (DPO) through a recipe, against the initial model."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.adapters.trainable import frozen_copy, zero_dropout
from flamingo_ft.config import load_recipe
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.training.train import train
from tests import regimes

DPO = ("train.method=dpo", "data.train=[{path: pairs.jsonl}]", "train.max_steps=3")
# Three steps of the defaults for a new bridge overshoot.
SLOWER = ("train.learning_rates.gates=1.0e-2", "train.optimizer=adamw")
CASES = {  # case -> trained parts, quantization of the frozen ones
    "bridge": ("bridge", "none"),
    "bridge and LoRA, nf4": ("bridge and LoRA", "nf4"),
    "LoRA only": ("LoRA only", "none"),
    "LoRA everywhere, int8": ("LoRA everywhere", "int8"),
}


@pytest.fixture
def pairs(small_run):
    """The small run, with a preference pair about each image."""
    answers = ("Dark.", "Light.")
    rows = [
        {"prompt": "Which shade?", "chosen": answers[i], "rejected": answers[1 - i], "images": [f"{i}.png"]}
        for i in range(2)
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return small_run


def overrides(case: str) -> tuple[str, ...]:
    regime, quantization = CASES[case]
    return (
        *DPO,
        *regimes.REGIMES[regime],
        *(SLOWER if regime.startswith("bridge") else ()),
        *(regimes.quantized(quantization, regime) if quantization != "none" else ()),
    )


def dpo_trainer(case: str, *more: str):
    model, processor = regimes.build(*overrides(case), *more)
    return regimes.trainer(model, processor, *overrides(case), *more)


def scores(trainer, model, batch) -> torch.Tensor:
    """Return log-probabilities of the chosen answers, then of the rejected ones, in evaluation mode."""
    model.eval()
    return torch.cat(trainer.compute_ref_log_probs(model, batch))


def storages(model) -> set[int]:
    """Return the addresses of a model's tensors, quantization state included."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        outer = getattr(state, "state2", None)
        tensors += [getattr(owner, "absmax", None) for owner in (state, outer)]
        tensors += [getattr(getattr(module, "state", None), "SCB", None)]
    return {tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.numel()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*list(CASES)[:-1], pytest.param(list(CASES)[-1], marks=pytest.mark.slow)])
def test_the_reference_stays_the_initial_policy(pairs, case):
    trainer = dpo_trainer(case)
    policy, reference, batch = trainer.model, trainer.ref_model, next(iter(trainer.batches))
    before = scores(trainer, policy, batch)
    assert torch.equal(scores(trainer, reference, batch), before)
    trainer.batches.load_state_dict({"next": 0, "waiting": [], "tally": trainer.batches.stats.state_dict()})
    trainer.train()
    assert torch.equal(scores(trainer, reference, batch), before)
    assert (scores(trainer, policy, batch) - before).abs().max() > 1e-2
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    # In the first step, policy and reference are the same model.
    assert losses[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    # One step raises the margin on any processor; later ones may overshoot at this rate.
    assert losses[0]["rewards/margins"] == 0 and losses[1]["rewards/margins"] > 0


@pytest.mark.parametrize("case", CASES)
def test_the_reference_copies_only_trainable_parameters(pairs, case):
    model, _ = regimes.build(*overrides(case))
    trained = trainable_parameters(model).values()
    reference = frozen_copy(model)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert len(storages(reference) - storages(model)) == len(trained)
    assert storages(model) - storages(reference) == {parameter.data_ptr() for parameter in trained}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_reference_and_policy_each_use_their_own_bridge(pairs, quantization):
    parts = regimes.REGIMES["bridge and LoRA"]
    model, processor = regimes.build(*DPO, *parts, *regimes.quantized(quantization))
    regimes.shake(model)
    reference = frozen_copy(model)
    before = regimes.logits(model, processor)
    assert torch.equal(regimes.logits(reference, processor), before)
    regimes.shake(model, seed=1)
    moved = regimes.logits(model, processor)
    assert not torch.equal(moved, before)
    assert torch.equal(regimes.logits(reference, processor), before)
    for parameter in reference.parameters():
        if not any(parameter is own for own in model.parameters()):
            parameter.data.zero_()
    assert torch.equal(regimes.logits(model, processor), moved)


def test_a_resumed_run_has_the_same_reference(pairs):
    first, again = (dpo_trainer("bridge and LoRA, nf4") for _ in range(2))
    first.train()  # a resumed run also builds its model anew and restores the trained parameters later
    for one, other in zip(first.ref_model.parameters(), again.ref_model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_resumed_dpo_ends_with_the_same_adapter_bit_for_bit(pairs):
    kept = (
        "train.max_steps=4",
        "train.save_steps=2",
        "train.save_total_limit=3",
        "train.checkpoint_dir=kept",
    )
    steps = (*DPO, *regimes.REGIMES["bridge and LoRA"], *kept)
    train(regimes.recipe(*steps, "train.output_dir=whole"))
    shutil.rmtree("kept/step-4")
    lines: list[str] = []
    train(regimes.recipe(*steps, "train.output_dir=resumed"), resume=True, log=lines.append)
    assert "step-2" in "".join(lines)
    whole, resumed = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert resumed == whole


def test_dropout_rates_kept_as_plain_numbers_are_zeroed_too():
    layer = torch.nn.Linear(2, 2)
    layer.attention_dropout, layer.dropped = 0.1, True
    zero_dropout(torch.nn.Sequential(layer))
    assert (layer.attention_dropout, layer.dropped) == (0.0, True)


def contents(*more: str) -> list:
    """Return (contents, tensors) of the first batches of a run."""
    model, processor = regimes.build(*DPO, *more)
    batches = regimes.trainer(model, processor, *DPO, *more).batches
    tensors = list(islice(batches, 4))
    return list(zip(batches.contents, tensors, strict=True))


def test_batch_contents_count_pairs_tokens_of_both_answers_and_each_image_once(pairs):
    for content, batch in contents("train.batch_size=2"):
        assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 4
        assert (len(content.rows), content.images, content.label_tokens) == (
            2,
            2,
            int(batch["completion_mask"].sum()),
        )


@pytest.mark.parametrize(
    "more", [["train.num_workers=2"], ["data.cache={folder: cache}"], ["data.group_by_length=true"]]
)
def test_workers_cache_and_length_grouping_work_for_pairs(pairs, more):
    plain, other = contents(), contents(*more)
    if "data.cache={folder: cache}" in more:
        assert all("vision_tokens" in batch and len(batch["vision_tokens"]) == 4 for _, batch in other)
        other = contents(*more)  # now from the cache
    for (content, batch), (other_content, other_batch) in zip(plain, other, strict=True):
        if more != ["data.group_by_length=true"]:
            assert content == other_content
            assert torch.equal(batch["input_ids"], other_batch["input_ids"])
        assert sorted(content.rows) == sorted(other_content.rows)


def test_dpo_evaluates_on_the_chosen_answer_and_skips_bad_rows_if_configured(pairs):
    rows = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(
        rows + "\n" + json.dumps({"prompt": "What?", "chosen": "A.", "rejected": "A."})
    )
    eval_data = "data.eval=[{path: eval.jsonl}]"
    Path("eval.jsonl").write_text(rows)
    with pytest.raises(UserError, match="pairs.jsonl: row 2: rejected: the same as chosen"):
        train(regimes.recipe(*DPO, eval_data))
    more = (
        "data.on_bad_sample=skip",
        "data.max_bad_share=0.5",
        "train.output_dir=skipped",
        "train.max_steps=2",
    )
    metrics = train(regimes.recipe(*DPO, eval_data, *more))
    assert {"accuracy", "accuracy_before", "accuracy_shuffled_images"} <= set(metrics["eval"])
    answers = [
        json.loads(line)["answer"] for line in Path("skipped/predictions.jsonl").read_text().splitlines()
    ]
    assert answers == ["Dark.", "Light."]
    assert [
        json.loads(line)["where"][-5:] for line in Path("skipped/left_out.jsonl").read_text().splitlines()
    ] == ["row 2"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["data.train=[{path: train.jsonl}]"],
            r"train.jsonl: train.method dpo expects preference pairs \(prompt, chosen, rejected\), "
            r"got messages samples",
        ),
        (
            ["train.method=sft"],
            "pairs.jsonl: expected samples with one answer, got preference pairs; set train.method to dpo",
        ),
        (
            ["data.packing=true", "data.max_text_tokens=64"],
            "data.packing: dpo compares pairs row by row, so samples cannot be packed; "
            r"set packing to false \(group_by_length also saves padding\)",
        ),
        (
            ["lora.language={r: 2}", "lora.lora_dropout=0.1"],
            "lora.lora_dropout: got 0.1, but dpo compares two models without dropout; set lora_dropout to 0",
        ),
        (
            ["train.dpo={loss_type: ipo, label_smoothing: 0.1}"],
            "train.dpo.label_smoothing: only the sigmoid loss has label smoothing, got loss_type ipo; "
            "use sigmoid, or set label_smoothing to 0",
        ),
    ],
)
def test_settings_incompatible_with_dpo_are_refused_in_one_line(pairs, more, message):
    with pytest.raises(UserError, match=message) as error:
        config = load_recipe("./recipe.yaml", [*DPO, *more])
        model, processor = regimes.build_model(config)
        regimes.make_trainer(model, processor, open_data(config.data, 0), config, [])
    assert len([line for line in str(error.value).splitlines() if line]) <= 2


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ("{}", lambda x: -torch.nn.functional.logsigmoid(0.1 * x)),
        ("{beta: 0.5, loss_type: hinge}", lambda x: (1 - 0.5 * x).relu()),
        (
            "{beta: 0.5, label_smoothing: 0.2}",
            lambda x: (
                -(
                    0.8 * torch.nn.functional.logsigmoid(0.5 * x)
                    - 0.2 * torch.nn.functional.logsigmoid(-0.5 * x)
                )
                / 0.6
            ),
        ),
    ],
)
def test_the_loss_equals_the_papers_formula(pairs, settings, loss):
    trainer = dpo_trainer("bridge", f"train.dpo={settings}")
    regimes.shake(trainer.model, 0.3)
    batch = next(iter(trainer.batches))
    policy, reference = (scores(trainer, model, batch) for model in (trainer.model, trainer.ref_model))
    chosen, rejected = (policy - reference).chunk(2)
    assert (chosen - rejected).abs().min() > 0.01
    with torch.no_grad():
        computed = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(computed, loss(chosen - rejected).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_eva_initialization_works_with_pairs(pairs):
    eva = ("lora.language={r: 2}", "lora.init_lora_weights=eva")
    config = load_recipe("./recipe.yaml", [*DPO, *eva])
    assert train(config)["train"]["steps"] == 3
