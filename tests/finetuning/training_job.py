"""Trains a compressed model in every way, alone or as one of several processes; prints the losses as JSON.

python training_job.py FOLDER OUT                       one process
torchrun --nproc-per-node 2 training_job.py FOLDER OUT   the same global batch, shared out
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from corank import checkpoint
from corank.heal import lora_config

IDS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
STEPS = 3


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def share() -> torch.Tensor:
    """This process's part of the global batch."""
    return IDS.chunk(world())[int(os.environ.get("RANK", 0))]


def mean(loss: torch.Tensor) -> float:
    loss = loss.detach().clone()
    if world() > 1:
        dist.all_reduce(loss)
    return loss.item() / world()


def load(folder: Path, name: str, lora: str = "") -> Any:
    model, _ = checkpoint.load(folder / name, tokenizer=False)
    torch.manual_seed(0)
    model.train()
    return get_peft_model(model, lora_config(model, 2, lora)) if lora else model


def loop(model: Any, backward: Any = torch.Tensor.backward) -> list[float]:
    """A few steps of AdamW; the loss before each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=share(), labels=share()).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return losses


def trainer(folder: Path, out: Path, lora: str) -> list[float]:
    """Hugging Face Trainer; saves at the end."""
    model = load(folder, "mixed", lora)
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        save_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=4 // world(),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world() > 1 else None,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    run = transformers.Trainer(model, arguments, train_dataset=rows)
    run.train()
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def accelerated(folder: Path, out: Path) -> list[float]:
    """accelerate's DDP; rank 0 saves."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(load(folder, "mixed"))
    assert type(model).__name__ == ("LlamaForCausalLM" if world() == 1 else "DistributedDataParallel")
    losses = loop(model, accelerator.backward)
    accelerator.unwrap_model(model).save_pretrained(
        out, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    return losses


def sharded(folder: Path, out: Path, name: str = "mixed", lora: str = "") -> list[float]:
    """FSDP2, a unit for every block; the state is gathered, rank 0 saves."""
    model = load(folder, name, lora)
    if world() > 1:
        mesh = init_device_mesh("cpu", (world(),))
        bare = model.get_base_model() if lora else model
        for layer in checkpoint.factorized(bare).values():
            if layer.followed:  # read from other blocks as well, so it is a unit of its own
                fully_shard(layer.down, mesh=mesh)
        for block in bare.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    losses = loop(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(out, state_dict=get_peft_model_state_dict(model, state) if lora else state)
    return losses


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    losses = {
        "trainer": trainer(folder, out / "trainer", ""),
        "trainer-lora": trainer(folder, out / "trainer-lora", "product"),
        "accelerate": accelerated(folder, out / "accelerate"),
        "fsdp": sharded(folder, out / "fsdp"),
        "fsdp-lora": sharded(folder, out / "fsdp-lora", lora="factors"),
        "fsdp-product": sharded(folder, out / "fsdp-product", lora="product"),
        "fsdp-shared": sharded(folder, out / "fsdp-shared", "across"),
    }
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        (out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
