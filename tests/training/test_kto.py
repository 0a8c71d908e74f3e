"""Kahneman-Tversky optimization (KTO, arXiv:2402.01306) through a recipe."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from trl import KTOConfig, KTOTrainer

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.data import Sample, open_data
from flamingo_ft.data.unpaired import labelled_answers
from flamingo_ft.errors import UserError
from flamingo_ft.training.eval_batches import EvalBatches
from flamingo_ft.training.train import train
from tests import regimes
from tests.data.dialogues import assistant, user

from . import methods

KTO = (
    "train.method=kto",
    "data.train=[{path: labelled.jsonl}]",
    "model.init_from=start",
    "data.template=flamingo",
)
PAIRS = "data.train=[{path: pairs.jsonl}]"


@pytest.fixture
def labelled(small_run):
    methods.write("labelled.jsonl", methods.labelled_rows())
    methods.write("pairs.jsonl", methods.pair_rows())
    return small_run


def kto_trainer(*more: str):
    model, processor = regimes.build(*KTO, *more)
    return regimes.trainer(model, processor, *KTO, *more)


def row_order(trainer) -> list[int]:
    """Return the numbers of the rows in the first batch."""
    return [int(name.rpartition(" ")[2]) for name in trainer.batches.contents[0].rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_loss_equals_plain_trls_on_the_same_batch(labelled, loss_type):
    settings = {"beta": 0.3, "loss_type": loss_type, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    overrides = ("train.batch_size=4", f"train.kto={json.dumps(settings)}")
    trainer = kto_trainer(*overrides)
    regimes.shake(trainer.model, 0.3)
    batch = next(iter(trainer.batches))
    with torch.no_grad():
        ours = float(trainer.compute_loss(trainer.model, trainer.prepare_inputs(batch)))
    config = KTOConfig(
        "plain", **settings, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none"
    )
    rows = [methods.labelled_rows()[row] for row in row_order(trainer)]
    assert ours == pytest.approx(methods.reference_loss(KTOTrainer, config, rows, *KTO, *overrides), rel=1e-5)


def test_only_declared_parts_change_and_the_reference_stays(labelled):
    trainer = kto_trainer(regimes.LORA, "trainable.perceiver=false", "train.max_steps=2")
    reference = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    declared = set(trainable_parameters(trainer.model))
    changed = methods.changed(trainer)
    assert changed <= declared
    assert {name.split(".")[0] for name in changed} == {
        "gated_cross_attn_layers",
        "token_rows",
        "lang_encoder",
    }
    assert all(torch.equal(p, reference[name]) for name, p in trainer.ref_model.named_parameters())


def test_a_pair_is_two_labelled_answers_and_an_epoch_has_each_once(labelled):
    trainer = kto_trainer(PAIRS)
    tokenizer, seen = trainer.processing_class.tokenizer, []
    for batch in islice(trainer.batches, 2):  # an epoch
        for ids, mask, label in zip(
            batch["input_ids"], batch["completion_mask"], batch["label"].tolist(), strict=True
        ):
            answer = tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
            seen.append((answer, label))
    answers = [(answer, label) for label in (True, False) for answer in methods.ANSWERS]
    assert sorted(seen) == sorted(answers) and trainer.batches.epoch == 1


def test_the_kl_rows_are_each_prompt_with_the_answer_before_it(labelled):
    batch = next(iter(kto_trainer("train.batch_size=4").batches))
    answers = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    others = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["KL_input_ids"], batch["KL_completion_mask"], strict=True)
    ]
    assert others == [answers[-1], *answers[:-1]]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_adapter_bit_for_bit(labelled):
    resumed, whole = methods.resumed_and_whole(*KTO, regimes.LORA)
    assert resumed == whole


def test_evaluation_asks_only_for_answers_labelled_good(labelled):
    evaluated = ("data.eval=[{path: labelled.jsonl}]", "eval.steps=1", "eval.max_new_tokens=4")
    metrics = train(regimes.recipe(*KTO, *evaluated))
    answers = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [answer["answer"] for answer in answers] == [*methods.ANSWERS]
    logged = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert {"eval_loss", "eval_rewards/margins"} <= set().union(*logged)
    assert metrics["eval"]["per_task"]["other"]["samples"] == 2
    assert "KTO" in Path("run/report.html").read_text()


def held_out_batches(processor, model, answers: int, batch_size: int) -> list[list[str]]:
    """Return "FILE: row N" of the rows of each batch, of pairs whose answers are all equally long."""
    sample = Sample([user(methods.QUESTION), assistant("A.")], [], "other", "", [assistant("B.")])
    pairs = [replace(sample, where=str(number)) for number in range(-(-answers // 2))]
    halves = [half for pair in pairs for half in labelled_answers(pair)][:answers]
    config = regimes.recipe(*KTO, "eval.steps=1", "data.eval=[{path: pairs.jsonl}]")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": batch_size})})
    batches = EvalBatches(halves, model, processor, config)
    rows, sizes = iter(batches.own_rows), [weight for _, weight in batches]
    return [[row.sample.where for row in islice(rows, size)] for size in sizes]


def test_held_out_answers_are_paired_with_those_to_other_prompts(labelled):
    model, processor = regimes.build(*KTO)
    batches = held_out_batches(processor, model, answers=32, batch_size=2)
    assert sum(one == other for one, other in batches) < 4
    assert batches == held_out_batches(processor, model, answers=32, batch_size=2)
    for answers, size, expected in ((5, 2, [2, 3]), (5, 4, [2, 3]), (7, 4, [4, 3]), (3, 1, [1, 1, 1])):
        sizes = [len(batch) for batch in held_out_batches(processor, model, answers, size)]
        assert sizes == expected


def test_rows_that_are_all_bad_leave_nothing_to_ask(labelled):
    methods.write("bad.jsonl", [row for row in methods.labelled_rows() if not row["label"]])
    metrics = train(regimes.recipe(*KTO, "data.eval=[{path: bad.jsonl}]"))
    assert "accuracy" not in metrics["eval"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["data.train=[{path: train.jsonl}]"],
            r"train.jsonl: train.method kto expects labelled answers \(prompt, completion, label\) or "
            "preference pairs, got messages samples; name such data, or set train.method to sft",
        ),
        (
            ["data.train=[{path: good.jsonl}]"],
            r"good.jsonl: train.method kto compares good answers with bad ones, got only good answers "
            r"\(label true\); add bad ones, or set train.method to sft for good ones alone",
        ),
        (["train.method=sft"], "expected samples with one answer, got labelled answers; set train.method"),
        (["data.train=[{path: none.jsonl}]"], "none.jsonl: row 1: label: expected true or false, got null"),
        (["train.batch_size=1"], "train.batch_size: got 1, but kto pairs each prompt"),
        (["data.packing=true", "data.max_text_tokens=64"], "data.packing: kto compares answers row by row"),
        (["train.fsdp=true"], "train.fsdp: kto's reference model shares the weights that would be sharded"),
        (["train.dpo={beta: 0.5}"], "train.dpo: has no effect with train.method kto; remove it"),
        (["train.kto={beta: -1}"], "train.kto.beta: must be more than 0, got -1"),
    ],
)  # fmt: skip
def test_what_kto_cannot_use_is_refused_in_one_line(labelled, more, message):
    rows = methods.labelled_rows()
    methods.write("good.jsonl", [row for row in rows if row["label"]])
    methods.write("none.jsonl", [rows[0], {**rows[1], "label": None}])
    with pytest.raises(UserError, match=message):
        config = regimes.recipe(*KTO, *more)
        data = open_data(config.data, 0)
        data.validate_rows()
        model, processor = regimes.build(*KTO, *more)
        regimes.make_trainer(model, processor, data, config, [])
