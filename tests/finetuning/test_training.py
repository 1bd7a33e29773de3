"""Full fine-tuning and adapters under Trainer, accelerate and FSDP2, by one process and by two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from corank import checkpoint
from corank.errors import CorankError
from corank.heal import load_lora, merge_lora
from factorized import IDS, across, logits, mixed

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
JOB = Path(__file__).with_name("training_job.py")
MODES = {
    "trainer": "mixed",
    "trainer-lora": "mixed",
    "accelerate": "mixed",
    "fsdp": "mixed",
    "fsdp-lora": "mixed",
    "fsdp-product": "mixed",
    "fsdp-shared": "across",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    checkpoint.save(mixed(), None, root / "mixed")
    checkpoint.save(across(), None, root / "across")
    return root


def launch(folder, processes):
    """The losses of every mode."""
    out = folder / f"by{processes}"
    out.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port
    command = [sys.executable, *(torchrun if processes > 1 else []), str(JOB), str(folder), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(folder):
    return launch(folder, 1)


@pytest.fixture(scope="module")
def together(folder):
    return launch(folder, 2)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does(alone, together, mode):
    assert alone[mode][-1] < alone[mode][0]
    torch.testing.assert_close(torch.tensor(together[mode]), torch.tensor(alone[mode]), rtol=1e-5, atol=1e-5)


def opened(folder, processes, mode):
    """What rank 0 saved at the end."""
    place = folder / f"by{processes}" / mode
    place = place / "checkpoint-3" if mode.startswith("trainer") else place
    if not (place / "adapter_config.json").is_file():
        checkpoint.verify(place)
        return transformers.AutoModelForCausalLM.from_pretrained(place)
    base, _ = checkpoint.load(folder / MODES[mode], tokenizer=False)
    return load_lora(base, place)


@pytest.mark.parametrize("mode", MODES)
def test_what_rank_0_saved_is_the_trained_model(folder, alone, together, mode):
    start = logits(checkpoint.load(folder / MODES[mode], tokenizer=False)[0])
    one, two = opened(folder, 1, mode), opened(folder, 2, mode)
    torch.testing.assert_close(logits(two), logits(one), rtol=5e-3, atol=5e-3)
    assert (logits(two) - start).abs().max() > 0.05
    if hasattr(two, "peft_config"):
        adapted = logits(two)
        torch.testing.assert_close(logits(merge_lora(two)), adapted, rtol=1e-3, atol=1e-4)
    else:
        section = two.config.quantization_config
        assert section.fingerprint.keys() == section.modules.keys()  # gathered and sharded weights are covered too


def test_the_trainer_goes_on_where_it_stopped(folder, tmp_path):
    def train(steps, resume=None):
        model, _ = checkpoint.load(folder / "mixed", tokenizer=False)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
        transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    train(1)
    first = checkpoint.load(tmp_path / "checkpoint-1", tokenizer=False)[0]
    resumed = train(2, str(tmp_path / "checkpoint-1"))
    straight = train(2)
    assert torch.equal(logits(resumed), logits(straight))
    assert not torch.allclose(logits(first), logits(straight), atol=1e-3)


def test_a_model_in_pieces_is_not_saved_in_pieces(folder, tmp_path):
    """Without torch.distributed a single piece is as good: the parameters are DTensors."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, _ = checkpoint.load(folder / "mixed", tokenizer=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(CorankError, match="gather"):
            checkpoint.save(model, None, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    finally:
        dist.destroy_process_group()
