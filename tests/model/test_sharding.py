"""A model sharded over two processes learns what it learns in one."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from flamingo_ft.adapters import save_adapter
from flamingo_ft.adapters.files import read_tensors
from flamingo_ft.model.sharding import full_tensor, shard
from tests import regimes

STEPS = 3
BRIDGE_AND_LORA = ("train.gradient_checkpointing=true", *regimes.REGIMES["bridge and LoRA"])


def rows(processor) -> list[dict[str, torch.Tensor]]:
    """Two samples of one length: one with an image, one without."""
    image = regimes.inputs(processor)["pixel_values"][:, :1]
    texts = (f"{processor.image_token} Which digit? A seven.", "And which one is this? A two.")
    ids = [processor.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    length = min(one.shape[1] for one in ids)
    ids = [one[:, :length] for one in ids]
    return [
        {"input_ids": ids[0], "labels": ids[0], "pixel_values": image},
        {"input_ids": ids[1], "labels": ids[1]},
    ]


def learn(model, batches) -> list[float]:
    """The mean loss of ``batches`` in each step; their gradients are averaged."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, foreach=False)
    losses = []
    for _ in range(STEPS):
        losses.append(0.0)
        for batch in batches:
            loss = model(**batch).loss
            (loss / len(batches)).backward()
            losses[-1] += float(loss.detach()) / len(batches)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def prepared(*overrides: str):
    model, processor = regimes.build(*overrides)
    regimes.shake(model, 0.3)
    if "train.gradient_checkpointing=true" in overrides:
        model.gradient_checkpointing_enable()
    return model.train(), processor


def sharded_process(rank: int, port: int, folder, overrides: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    model, processor = prepared(*overrides)
    before = sum(p.numel() for p in model.parameters())
    shard(model)
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    apart = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    losses = torch.tensor(learn(model, [rows(processor)[rank]]))
    torch.distributed.all_reduce(losses)
    state = {name: full_tensor(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, processor, folder / f"adapter-{rank}")
    results = {"losses": losses / 2, "share": local / before, "apart": apart, "state": state}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def sharded(folder, *overrides: str) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = (port, folder, overrides)
    multiprocessing.start_processes(sharded_process, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), BRIDGE_AND_LORA], ids=["bridge", "bridge and LoRA, checkpointed"])
def test_two_processes_with_half_of_the_model_each_learn_what_one_learns(small_run, overrides):
    results = sharded(small_run, *overrides)
    model, processor = prepared(*overrides)
    alone = torch.tensor(learn(model, rows(processor)))
    for one in results:
        assert not one["apart"] and one["share"] == pytest.approx(0.5, abs=0.02)
        torch.testing.assert_close(one["losses"], alone, rtol=1e-5, atol=0)
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(results[0]["state"], learned, rtol=1e-4, atol=1e-5)
    save_adapter(model, processor, small_run / "alone")
    of_both, of_one = read_tensors(small_run / "adapter-0"), read_tensors(small_run / "alone")
    torch.testing.assert_close(of_both, of_one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_parameters_of_another_dtype_than_their_unit_are_replicated_and_trained(small_run):
    bf16 = ("trainable.dtype=bf16",)
    results = sharded(small_run, *bf16)
    assert results[0]["apart"] and any(name.endswith("_gate") for name in results[0]["apart"])
    gates = [name for name in results[0]["state"] if name.endswith("_gate")]
    start, _ = prepared(*bf16)
    for name in gates:
        assert torch.equal(results[0]["state"][name], results[1]["state"][name])
        assert not torch.equal(results[0]["state"][name], start.get_parameter(name))
