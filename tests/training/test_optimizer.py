"""A recipe's optimizers: parameter groups, steps inside the backward pass, schedules, refusals."""

import copy
from functools import partial

import pytest
import timm.optim
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW32bit
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainerCallback

from flamingo_ft.adapters import trainable_parameters
from flamingo_ft.errors import UserError
from flamingo_ft.model.parts import OPTIMIZER_GROUPS, is_gate, optimizer_group
from flamingo_ft.training.build import trainer_arguments
from flamingo_ft.training.muon import RATE_FACTOR, Muon
from flamingo_ft.training.optimizer import (
    InBackwardOptimizer,
    make_optimizer,
    parameter_groups,
    peak_rates,
)
from flamingo_ft.training.preflight import check_machine

from ..regimes import LORA, REGIMES, build, inputs, quantized, recipe, shake, trainer

STEPS = "train.max_steps=3"


def trained(*overrides: str) -> dict[str, torch.Tensor]:
    """Return the trainable parameters after a few steps."""
    model, processor = build("model.init_from=start", *overrides)
    trainer(model, processor, "model.init_from=start", STEPS, *overrides).train()
    return trainable_parameters(model)


@pytest.mark.parametrize(
    ("regime", "optimizer"), [("bridge", "adamw"), ("bridge and LoRA", "adamw"), ("bridge and LoRA", "muon")]
)
def test_in_backward_steps_equal_ordinary_steps(small_run, regime, optimizer):
    """Bit for bit, with clipping (which is per parameter in the backward pass) switched off."""
    options = ("train.max_grad_norm=1.0e+9", "train.warmup_steps=2", f"train.optimizer={optimizer}")
    unclipped = (*REGIMES[regime], *options)
    after, inside = trained(*unclipped), trained(*unclipped, "train.optimizer_in_backward=true")
    assert after.keys() == inside.keys()
    assert all(torch.equal(after[name], inside[name]) for name in after)


def test_in_backward_steps_equal_ordinary_steps_with_gradient_checkpointing(small_run):
    unclipped = ("train.max_grad_norm=1.0e+9", "train.gradient_checkpointing=true")
    after, inside = trained(*unclipped), trained(*unclipped, "train.optimizer_in_backward=true")
    assert all(torch.equal(after[name], inside[name]) for name in after)


def test_in_backward_steps_free_each_gradient_and_clip_it_by_itself(small_run):
    model, processor = build()
    shake(model)
    groups = [{"params": list(trainable_parameters(model).values()), "weight_decay": 0.0}]
    before = {name: parameter.clone() for name, parameter in trainable_parameters(model).items()}
    plain = copy.deepcopy(model)
    plain(**inputs(processor), labels=inputs(processor)["input_ids"]).loss.backward()
    InBackwardOptimizer(groups, partial(torch.optim.SGD, lr=1.0), max_norm=1e-3)
    model(**inputs(processor), labels=inputs(processor)["input_ids"]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(plain).items()}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is None
        length = gradients[name].norm()
        step = gradients[name] * min(1.0, 1e-3 / (length + 1e-6))
        torch.testing.assert_close(parameter, before[name] - step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW8bit, PagedAdamW32bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_backward_optimizer_state_is_saved_and_restored_exactly(kind, dtype):
    torch.manual_seed(0)
    parameter, other = torch.nn.Parameter(torch.randn(8192, dtype=dtype)), None
    gradients = torch.randn(4, 8192, dtype=dtype)

    def optimizer(p):
        return InBackwardOptimizer([{"params": [p], "lr": 0.1}], partial(kind, lr=0.1), max_norm=1e9)

    first = optimizer(parameter)
    for gradient in gradients[:2]:
        (parameter * gradient).sum().backward()
    other = torch.nn.Parameter(parameter.detach().clone())
    second = optimizer(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[2:]:
        (parameter * gradient).sum().backward()
        (other * gradient).sum().backward()
    assert torch.equal(parameter, other)


ONE_FEATURE = ("adamw_8bit", "paged_adamw")  # paged_adamw_8bit has both


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ONE_FEATURE), "paged_adamw_8bit"]
)
@pytest.mark.parametrize("inside", ["false", "true"])
def test_8_bit_and_paged_optimizers_update_like_adamw(small_run, name, inside):
    """Adam's first steps are about the gradient's sign times the learning rate."""
    start = trained("train.learning_rate=1.0e-12")
    exact, low_memory = (
        trained(),
        trained(f"train.optimizer={name}", f"train.optimizer_in_backward={inside}"),
    )
    moved, moved_low_memory = (
        {n: p.detach() - start[n].detach() for n, p in after.items()} for after in (exact, low_memory)
    )
    for parameter, update in moved.items():
        assert torch.isfinite(low_memory[parameter]).all()
        if update.numel() > 1000:
            assert (
                torch.cosine_similarity(update.flatten(), moved_low_memory[parameter].flatten(), dim=0) > 0.9
            ), parameter


def test_muon_updates_the_attention_matrices_of_the_bridge_and_leaves_the_rest_to_adamw(small_run):
    start = trained(LORA, "train.learning_rate=1.0e-12")
    one_step = (LORA, "train.max_steps=1", "train.learning_rate=1.0e-3", "train.weight_decay=0")
    muon, adamw = (trained(*one_step, f"train.optimizer={name}") for name in ("muon", "adamw"))
    matrices = {name for name in start if name.endswith(("to_q.weight", "to_kv.weight", "to_out.weight"))}
    assert 0 < len(matrices) < len(start)
    for name, before in start.items():
        if name in matrices:
            norm = torch.linalg.matrix_norm(muon[name].detach() - before.detach(), ord=2)
            rate = RATE_FACTOR * 1e-3 * 0.2 * max(before.shape) ** 0.5
            assert 0.7 < norm / rate < 1.3, name  # an orthogonal update's; the iteration is not exact
        else:
            torch.testing.assert_close(muon[name], adamw[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_muon_equals_timms_in_bf16(shape):
    torch.manual_seed(0)
    ours, timms = (torch.nn.Parameter(tensor) for tensor in torch.randn(shape).expand(2, *shape).clone())
    group = {"orthogonalized": True, "lr": 0.02, "weight_decay": 0.1}
    optimizers = (
        Muon([{"params": [ours], **group}], torch.bfloat16),
        timm.optim.Muon(
            [timms], lr=RATE_FACTOR * 0.02, weight_decay=0.1, nesterov=True, ns_coefficients="original"
        ),
    )
    for gradient in torch.randn(5, *shape):
        ours.grad, timms.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, timms, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_muon_updates_matrices_together_as_it_does_each_alone(shape, monkeypatch):
    monkeypatch.setattr("flamingo_ft.training.muon.MAX_STACKED", 2 * 3 * 5)  # of five, two at a time
    options = {"orthogonalized": True, "lr": 0.02, "weight_decay": 0.1}
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(shape).double()) for _ in range(5)]
    alone = [torch.nn.Parameter(parameter.detach().clone()) for parameter in together]
    optimizers = [
        Muon([{"params": parameters, **options}], torch.float64)
        for parameters in (together, *([parameter] for parameter in alone))
    ]
    for _ in range(3):
        for first, second in zip(together[:4], alone, strict=False):  # the last one has no gradient
            first.grad = second.grad = torch.randn(shape).double()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_large_adamw_8bit_states_are_in_8_bits(small_run):
    model, processor = build()
    sft_trainer = trainer(model, processor, STEPS, "train.optimizer=adamw_8bit")
    sft_trainer.train()
    states = {
        name: sft_trainer.optimizer.state[parameter]
        for name, parameter in trainable_parameters(model).items()
    }
    large = {name: state for name, state in states.items() if model.get_parameter(name).numel() >= 4096}
    assert large and all(state["state1"].dtype == torch.uint8 for state in large.values())


def test_only_matrices_decay_and_not_latents_or_token_rows(small_run):
    model, processor = build(*REGIMES["bridge and LoRA"])
    groups = trainer(model, processor).optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in trainable_parameters(model).items():
        decayed = parameter.dim() >= 2 and "latents" not in name and "token_rows" not in name
        assert decay[id(parameter)] == (0.1 if decayed else 0.0), name


# with weight decay and without it; rows of new tokens never have it
BRIDGE_GROUPS = ["perceiver", "perceiver", "cross_attention", "cross_attention", "new_tokens"]
ADAMW = "train.optimizer=adamw"
RATES = (
    "train.learning_rates="
    "{perceiver: 0.001, cross_attention: 0.002, gates: 0.02, new_tokens: 0.003, lora: 0.004}"
)
DECAYS = "train.weight_decays={perceiver: 0.1, cross_attention: 0.0, lora: 0.3}"


def test_each_part_has_its_own_learning_rate_and_weight_decay(small_run):
    model, processor = build(LORA, "trainable.new_tokens=true")
    groups = trainer(model, processor, LORA, RATES, DECAYS, ADAMW).optimizer.param_groups
    assert [group["name"] for group in groups] == [*BRIDGE_GROUPS, "gates", "lora"]
    rates, decays = ({g["name"]: g[key] for g in groups[::-1]} for key in ("lr", "weight_decay"))
    assert rates == {
        "perceiver": 0.001,
        "cross_attention": 0.002,
        "gates": 0.02,
        "new_tokens": 0.003,
        "lora": 0.004,
    }
    assert decays == {"perceiver": 0.1, "cross_attention": 0.0, "gates": 0.0, "new_tokens": 0.0, "lora": 0.3}
    group_of = {id(p): group["name"] for group in groups for p in group["params"]}
    for name, parameter in trainable_parameters(model).items():
        own = optimizer_group(name)
        assert group_of[id(parameter)] == ("lora" if own == "lora_b" else own), name
    assert len(group_of) == len(trainable_parameters(model))
    with_muon = parameter_groups(model, recipe(LORA, RATES, DECAYS, "train.optimizer=muon"))
    orthogonalized = {group["name"]: group for group in with_muon if group["orthogonalized"]}
    assert orthogonalized.keys() == {"perceiver", "cross_attention"}
    for name, group in orthogonalized.items():
        assert (group["lr"], group["weight_decay"]) == (rates[name], decays[name])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            (),
            {"perceiver": 1e-3, "cross_attention": 1e-3, "gates": 1e-2, "new_tokens": 1e-3, "lora": 1e-4},
        ),
        (("model.init_from=start",), dict.fromkeys(OPTIMIZER_GROUPS, 1e-4)),
        (
            ("train.learning_rate=0.5", "train.learning_rates.cross_attention=0.25"),
            {"perceiver": 0.5, "cross_attention": 0.25, "gates": 2.5, "new_tokens": 0.5, "lora": 0.5},
        ),
        (
            ("train.learning_rate=0.5", "train.learning_rates.gates=0.125"),
            {"perceiver": 0.5, "cross_attention": 0.5, "gates": 0.125, "new_tokens": 0.5, "lora": 0.5},
        ),
    ],
    ids=["a new bridge", "a trained bridge", "shared and own", "the gates' own"],
)
def test_learning_rates_that_the_recipe_leaves_out_depend_on_what_is_trained(small_run, settings, expected):
    rates = peak_rates(recipe("train.learning_rate=null", *settings))
    assert rates == expected | {"lora_b": expected["lora"]}


def test_gates_at_the_rate_of_their_blocks_keep_the_groups_of_older_checkpoints(small_run):
    """An optimizer's saved state is matched by position."""
    model, _ = build()
    settings = ("train.optimizer=adamw", "train.learning_rate=0.1", "train.learning_rates.gates=0.1")
    groups = parameter_groups(model, recipe(*settings))
    assert [group["name"] for group in groups] == BRIDGE_GROUPS
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    undecayed = [names[id(parameter)] for parameter in groups[3]["params"]]
    assert (
        undecayed == sorted(undecayed) and any(map(is_gate, undecayed)) and not all(map(is_gate, undecayed))
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_lora_plus_gives_each_parameter_the_learning_rate_that_peft_gives_it(small_run, optimizer):
    settings = (*REGIMES["LoRA only"], "lora.use_dora=true", "train.learning_rates.lora=0.001")
    model, _ = build(*settings)
    plus = (f"train.optimizer={optimizer}", "train.learning_rates.loraplus_lr_ratio=16")
    groups = parameter_groups(model, recipe(*settings, *plus))
    pefts = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.001, loraplus_lr_ratio=16)
    ours, theirs = (
        {id(parameter): group["lr"] for group in some for parameter in group["params"]}
        for some in (groups, pefts.param_groups)
    )
    assert ours == theirs and {*ours.values()} == {0.001, 0.016}
    assert {group["name"]: group["lr"] for group in groups} == {"lora": 0.001, "lora_b": 0.016}


def test_lora_plus_without_lora_is_refused_in_one_line(small_run):
    message = (
        "train.learning_rates.loraplus_lr_ratio: has no effect, because no part has LoRA; "
        "remove it, or configure lora for a part"
    )
    with pytest.raises(UserError, match=message):
        recipe("train.learning_rates.loraplus_lr_ratio=16")


def test_a_trainable_parameter_without_a_group_is_not_left_out_silently(small_run):
    model, _ = build()
    name = next(name for name, _ in model.named_parameters() if optimizer_group(name) == "vision")
    model.get_parameter(name).requires_grad_(True)
    with pytest.raises(ValueError, match=f"^{name} is trainable, but vision is not in OPTIMIZER_GROUPS$"):
        parameter_groups(model, recipe())


@pytest.mark.parametrize(
    "settings", ["adamw", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "inside"]
)
def test_a_part_with_a_tiny_learning_rate_hardly_moves_under_any_optimizer(small_run, settings):
    """Adam's first steps are as large as the learning rate."""
    inside, name = settings == "inside", "adamw" if settings == "inside" else settings
    options = (f"train.optimizer={name}", f"train.optimizer_in_backward={str(inside).lower()}")
    still = ("train.learning_rates.perceiver=1.0e-12", "train.weight_decay=0")
    model, processor = build("model.init_from=start", LORA)
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    trainer(model, processor, "model.init_from=start", LORA, STEPS, *still, *options).train()
    moved = dict.fromkeys(OPTIMIZER_GROUPS, 0.0)
    for name, parameter in trainable_parameters(model).items():
        change = (parameter.detach() - before[name]).abs().max().item()
        moved[optimizer_group(name)] = max(moved[optimizer_group(name)], change)
    assert moved["perceiver"] < 1e-6 and min(moved[part] for part in ("cross_attention", "lora")) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_saved_optimizer_state_fits_the_same_recipe(small_run, optimizer):
    """The order of the groups does not depend on the order of the model's parameters."""
    options = (LORA, RATES, STEPS, f"train.optimizer={optimizer}")
    first, second = (trainer(*build(LORA), *options) for _ in range(2))
    first.train()
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for name, parameter in trainable_parameters(first.model).items():
        kept, loaded = (
            first.optimizer.state[parameter],
            second.optimizer.state[second.model.get_parameter(name)],
        )
        assert kept.keys() == loaded.keys(), name
        assert all(torch.equal(*map(torch.as_tensor, (kept[key], loaded[key]))) for key in kept), name


@pytest.mark.parametrize(
    ("scheduler", "shares"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_warmup_and_decay_count_optimizer_steps(small_run, scheduler, shares):
    """For every group alike, as fractions of its peak."""
    course = (
        "train.max_steps=6",
        "train.warmup_steps=2",
        f"train.lr_scheduler={scheduler}",
        RATES,
        LORA,
        ADAMW,
    )
    settings = (*course, "train.gradient_accumulation_steps=3", "train.batch_size=1")
    sft_trainer, rates_by_step = trainer(*build(LORA), *settings), []
    sft_trainer.add_callback(_Rates(rates_by_step))
    sft_trainer.train()
    for peak, rates in zip(
        (0.001, 0.001, 0.002, 0.002, 0.003, 0.02, 0.004), zip(*rates_by_step, strict=True), strict=True
    ):
        torch.testing.assert_close(
            torch.tensor(rates) / peak, torch.tensor(shares).float(), rtol=1e-4, atol=1e-6
        )


class _Rates(TrainerCallback):
    """Records the learning rate of each group at each step."""

    def __init__(self, rates_by_step):
        self.rates_by_step = rates_by_step

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.rates_by_step.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["train.learning_rates.lora=0.1"],
            "train.learning_rates.lora: has no effect, because no part has LoRA; "
            "remove it, or configure lora for a part",
        ),
        (
            ["train.weight_decays.lora=0.1"],
            "train.weight_decays.lora: has no effect, because no part has LoRA; "
            "remove it, or configure lora for a part",
        ),
        (
            ["trainable.new_tokens=false", "train.learning_rates.new_tokens=0.1"],
            "train.learning_rates.new_tokens: has no effect, because trainable.new_tokens is false; "
            "remove it, or train the part",
        ),
        (
            ["trainable.perceiver=false", "lora.perceiver={r: 2}", "train.learning_rates.perceiver=0.1"],
            "train.learning_rates.perceiver: has no effect, because the part is trained through LoRA; "
            "use train.learning_rates.lora",
        ),
        (
            ["trainable.cross_attention=false", "train.learning_rates.gates=0.1"],
            "train.learning_rates.gates: has no effect, because trainable.cross_attention is false; "
            "remove it, or train the part",
        ),
        (["train.learning_rates.gates=0"], "train.learning_rates.gates: "),
    ],
)
def test_a_learning_rate_for_a_frozen_part_is_refused(small_run, settings, message):
    with pytest.raises(UserError, match=message):
        recipe(*settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"_n_gpu": 2}, "got 2 processes or GPUs"), ({"fp16": True}, "float16 needs loss scaling")],
)
def test_in_backward_steps_refuse_several_processes_and_float16(small_run, arguments, message):
    model, _ = build()
    config = recipe("train.optimizer_in_backward=true")
    training_arguments = trainer_arguments(config)
    for name, value in arguments.items():
        object.__setattr__(training_arguments, name, value)
    with pytest.raises(UserError, match=f"train.optimizer_in_backward: {message}"):
        make_optimizer(model, config, training_arguments)


def test_offloading_activations_without_a_gpu_is_refused(small_run):
    with pytest.raises(
        UserError, match="train.activation_offload: got true, but no GPU is available; set it to false"
    ):
        check_machine(recipe("train.activation_offload=true").train)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_checkpointed_training_through_quantized_backbones_gives_the_same_losses(small_run, form):
    overrides = (*quantized(form), *REGIMES["bridge and LoRA"])
    plain, checkpointed = trained(*overrides), trained(*overrides, "train.gradient_checkpointing=true")
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [None, "nf4", "int8"])
def test_bf16_works_without_a_gpu_and_keeps_trainable_parameters_in_float32(small_run, form):
    overrides = ("train.precision=bf16", *REGIMES["bridge and LoRA"], *(quantized(form) if form else ()))
    after = trained(*overrides)
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in after.values())
