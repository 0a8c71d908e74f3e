"""Group relative policy optimization (GRPO, arXiv:2402.03300) through a recipe."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from trl import GRPOConfig, GRPOTrainer

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.data import open_data
from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.metrics import find_metrics
from flamingo_ft.training.grpo import reward_functions, score_answers
from flamingo_ft.training.train import train
from tests import regimes
from tests.thinned import slow

from . import methods

GRPO = (
    "train.method=grpo", "model.init_from=start", "train.batch_size=4",
    "train.grpo.num_generations=2", "train.grpo.max_completion_tokens=4",
)  # fmt: skip
LENGTH = "reward.py:reward"


@pytest.fixture
def questions(small_run):
    """The small run, and a reward that differs between answers of an untrained model."""
    Path("reward.py").write_text("def reward(prediction, references):\n    return len(prediction) % 7\n")
    return small_run


def grpo_trainer(*more: str):
    model, processor = regimes.build(*GRPO, *more)
    return regimes.trainer(model, processor, *GRPO, *more)


def plain_trainer(rows: list[dict], **settings):
    """Return TRL's unmodified trainer on these questions."""
    model, processor = regimes.build(*GRPO)
    (reward,) = reward_functions(regimes.recipe(*GRPO, f"train.grpo.reward={LENGTH}").train.grpo)
    config = GRPOConfig(
        "plain", num_generations=2, max_completion_length=4, per_device_train_batch_size=4, use_cpu=True,
        bf16=False, report_to="none", shuffle_dataset=False, disable_dropout=True, **settings,
    )  # fmt: skip
    model.generation_config.eos_token_id = grpo_trainer().eos_token_ids
    return GRPOTrainer(model, reward, config, methods.for_trl(rows), processing_class=processor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [slow(1.0), 1.5])
def test_answers_advantages_and_loss_equal_plain_trls(questions, temperature):
    ours = grpo_trainer(f"train.grpo.reward={LENGTH}", f"train.grpo.temperature={temperature}")
    batch = next(iter(ours.batches))
    order = [int(row["where"].rpartition(" ")[2]) for row in batch[::2]]
    rows = [{"prompt": methods.QUESTION, "references": [""], "images": [f"{row}.png"]} for row in order]
    plain = plain_trainer(rows, temperature=temperature)
    sampled = []
    for trainer, inputs in ((ours, batch), (plain, next(iter(plain.get_train_dataloader())))):
        trainer.model.train()
        regimes.shake(trainer.model, 0.3)
        trainer.current_gradient_accumulation_steps = 1  # Trainer sets it in a step
        torch.manual_seed(1)
        prepared = trainer._prepare_inputs(inputs)
        with torch.no_grad():
            sampled.append((prepared, trainer.compute_loss(trainer.model, prepared)))
    (our_inputs, our_loss), (plain_inputs, plain_loss) = sampled
    assert our_inputs.keys() == plain_inputs.keys()
    assert our_inputs["advantages"].abs().max() > 0.5
    for name, value in our_inputs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, plain_inputs[name])
    torch.testing.assert_close(our_loss, plain_loss)


def test_only_declared_parts_change_and_the_reference_stays(questions):
    more = (regimes.LORA, f"train.grpo.reward={LENGTH}", "train.grpo.beta=0.1", "train.max_steps=2")
    trainer = grpo_trainer(*more, "trainable.perceiver=false")
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
    assert trainer.state.log_history[-2]["kl"] > 0
    assert not trainer.model.generation_config.do_sample  # evaluations are greedy


def test_without_beta_there_is_no_reference(questions):
    assert grpo_trainer().ref_model is None


def test_a_resumed_run_samples_the_same_answers_bit_for_bit(questions):
    resumed, whole = methods.resumed_and_whole(
        *GRPO, f"train.grpo.reward={LENGTH}", "train.gradient_accumulation_steps=2"
    )
    assert resumed == whole


def test_a_run_logs_rewards_metrics_and_the_held_out_loss(questions):
    evaluated = (
        "data.eval=[{path: train.jsonl}]",
        "eval.steps=1",
        "eval.max_new_tokens=4",
        "eval.metric=accuracy",
    )
    metrics = train(regimes.recipe(*GRPO, *evaluated, "train.grpo.temperature=2.0"))
    assert metrics["train"]["best"]["accuracy"] == metrics["eval"]["accuracy"]
    logged = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert {"reward", "rewards/accuracy/mean", "eval_loss", "eval_image_loss_gap"} <= set().union(*logged)
    assert "GRPO" in Path("run/report.html").read_text()


def test_the_held_out_loss_is_that_of_sft_at_any_temperature(questions):
    model, processor = regimes.build("model.init_from=start")
    sft = regimes.trainer(model, processor, "model.init_from=start")
    grpo, batch = grpo_trainer("train.grpo.temperature=3.0"), next(iter(sft.batches))
    with torch.no_grad():
        losses = [one.compute_loss(one.model, one.prepare_inputs(batch)) for one in (sft, grpo)]
    torch.testing.assert_close(losses[1], losses[0])


def test_questions_without_images_are_sampled_beside_those_with_one(questions):
    row = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}
    Path("train.jsonl").write_text(Path("train.jsonl").read_text() + "\n" + json.dumps(row))
    trainer = grpo_trainer("train.batch_size=6", f"train.grpo.reward={LENGTH}")
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_probabilities_that_are_not_finite_are_reported_in_one_line(questions):
    trainer = grpo_trainer(f"train.grpo.reward={LENGTH}")
    for parameter in trainer.model.gated_cross_attn_layers.parameters():
        parameter.data.fill_(1e30)
    message = (
        r"not finite at step 1; sampled for .*train.jsonl: row [01] and others; lower train.learning_rate"
    )
    with pytest.raises(UserError, match=message):
        trainer.train()


@pytest.mark.slow
def test_the_loss_of_held_out_rows_without_images_is_measured_without_swapped_images_too(questions):
    row = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]}
    Path("text.jsonl").write_text(json.dumps(row))
    evaluated = ("data.eval=[{path: train.jsonl}, {path: text.jsonl}]", "eval.shuffled_images=false")
    metrics = train(regimes.recipe(*GRPO, *evaluated, "eval.max_new_tokens=4"))
    assert metrics["eval"]["loss_by_kind"]["text_only"].keys() >= {"before", "after"}


# --- rewards ---


def test_rewards_are_the_scores_of_the_metrics_answer_by_answer():
    answers, references = ["Seven", "two dogs run", ""], [["seven."], ["two dogs ran", "dogs"], ["x"]]
    accuracy, bleu = find_metrics(["accuracy", "bleu_1"])
    assert score_answers(accuracy, answers, references) == [1.0, 0.0, 0.0]
    scores = score_answers(bleu, answers, references)
    assert scores[:2] == [pytest.approx(1.0), pytest.approx(2 / 3)]


def test_several_rewards_are_logged_by_name(questions):
    weighted = f"train.grpo={{reward: [accuracy, {LENGTH}], reward_weights: [1.0, 0.5], num_generations: 2}}"
    trainer = grpo_trainer(weighted, "train.grpo.max_completion_tokens=4")
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    means = [entry[f"rewards/{name}/mean"] for name in ("accuracy", "reward")]
    assert entry["reward"] == pytest.approx(means[0] + 0.5 * means[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["train.batch_size=6", "train.grpo.num_generations=4"],
            "train.grpo.num_generations: got 4, which does not divide train.batch_size 6, the number of "
            "sampled answers per forward pass; use a divisor, or change the batch size",
        ),
        (["train.grpo.reward=fluency"], "train.grpo.reward.0: must be 'accuracy', .* got 'fluency'"),
        (
            ["train.grpo.reward=meteor"],
            "train.grpo.reward: meteor runs Java, which is too slow to score every sampled answer; use acc",
        ),
        (["train.grpo.reward=cider_d"], "train.grpo.reward: cider_d scores all answers together, not"),
        (["train.grpo.reward=missing.py:score"], "missing.py:score: no such file; correct the path"),
        (["train.grpo={reward: [accuracy, anls], reward_weights: [1.0], num_generations: 2}"],
         "train.grpo.reward_weights: got 1 weights for the 2 entries of reward; use one for each, or null"),
        (["data.train=[{path: open.jsonl}]"], "open.jsonl: row 0: messages: no assistant message; add"),
        (["data.train=[{path: captions.jsonl}]"], "captions.jsonl: row 0: got a caption or document;"),
        (["data.train=[{path: pairs.jsonl}]"], "pairs.jsonl: train.method grpo expects questions"),
        (["data.cache={folder: cache}"], "data.cache: grpo passes images to"),
        (["data.tiles={max: 4}"], "data.tiles: grpo passes whole images to the model's own generation"),
        (["data.packing=true", "data.max_text_tokens=64"], "data.packing: grpo samples answers row by row"),
        (["train.fsdp=true"], "train.fsdp: grpo samples answers, which a sharded model cannot"),
        (["train.neftune_noise_alpha=5"], "train.neftune_noise_alpha: grpo compares probabilities"),
        (["data.max_text_tokens=5", "train.grpo.max_completion_tokens=5"],
         "train.grpo.max_completion_tokens: got 5, which leaves no room for the question: the limit is 5"),
    ],
)  # fmt: skip
def test_what_grpo_cannot_use_is_refused_in_one_line(questions, more, message):
    methods.write("open.jsonl", [{"messages": [{"role": "user", "content": methods.QUESTION}]}])
    methods.write("captions.jsonl", [{"image": "0.png", "caption": "Dark."}])
    methods.write("pairs.jsonl", methods.pair_rows())
    with pytest.raises(UserError, match=message):
        config = regimes.recipe(*GRPO, *more)
        model, processor = regimes.build(*GRPO, *more)
        trainer = regimes.make_trainer(model, processor, open_data(config.data, 0), config, [])
        next(iter(trainer.batches))


def test_a_video_is_refused_by_its_row(questions):
    Image.open("0.png").save("frame.png")
    row = {"question": "What?", "answer": "Dark.", "video": ["frame.png", "frame.png"]}
    methods.write("videos.jsonl", [row])
    with pytest.raises(UserError, match="videos.jsonl: row 0: got a video; grpo takes images only"):
        next(iter(grpo_trainer("data.train=[{path: videos.jsonl}]").batches))
