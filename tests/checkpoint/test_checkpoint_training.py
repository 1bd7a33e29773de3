"""Loaded models train, take adapters, generate, compile and export like any other."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoint_models import compress, make, outputs, share
from torch import nn

from corank import checkpoint
from corank.errors import CorankError
from corank.factors import FactorizedLinear

IDS = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    model = share(make("llama"), [f"model.layers.0.self_attn.{x}_proj" for x in "qk"])
    return checkpoint.save(compress(model), None, tmp_path / "out")


def test_trainer_trains_the_factors_and_saves_a_coherent_checkpoint(folder, tmp_path):
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import validate_quantization_for_training

    model, _ = checkpoint.load(folder, tokenizer=False)
    validate_quantization_for_training(model)
    model.is_quantized = True  # as for a quantizer that does not lift the flag: still allowed
    validate_quantization_for_training(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, now in model.named_parameters() if not torch.equal(now, before[name])}
    q_proj = "model.layers.0.self_attn.q_proj"
    assert {f"{q_proj}.up.weight", f"{q_proj}.down.weight"} <= changed
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and not frozen & changed
    saved = tmp_path / "run" / "checkpoint-2"
    checkpoint.verify(saved)  # the norms are those of the trained factors
    again, _ = checkpoint.load(saved, tokenizer=False)
    assert torch.equal(outputs(again), outputs(model.eval()))
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(CorankError, match="changed since"):
        checkpoint.check_fingerprint(model, section["fingerprint"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_peft_all_linear_trains_and_merges_into_the_factors(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = checkpoint.load(folder, tokenizer=False)
    start = outputs(model)
    sites = set(checkpoint.collect(model))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    adapted = {name for name, _ in wrapped.named_parameters() if "lora_A" in name}
    assert any("q_proj.down" in name for name in adapted) and any("q_proj.up" in name for name in adapted)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(CorankError, match="merge_and_unload"):
        checkpoint.save(wrapped, None, tmp_path / "no")
    adapted_outputs = outputs(wrapped.eval())
    merged = wrapped.merge_and_unload()
    assert set(checkpoint.collect(merged)) == sites  # rank preserved, still factorized
    torch.testing.assert_close(outputs(merged), adapted_outputs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(merged), start, atol=1e-4)
    checkpoint.save(merged, None, tmp_path / "merged")
    again, _ = checkpoint.load(tmp_path / "merged", tokenizer=False)
    assert torch.equal(outputs(again), outputs(merged))


def test_generate_compile_and_copy(folder):
    model, _ = checkpoint.load(folder, tokenizer=False)
    del model.model.layers[1:]  # compiling takes its time
    model.config.num_hidden_layers = 1
    ids = IDS[:1]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FactorizedLinear):
                module.up.weight.zero_()
    assert torch.equal(clone(ids, use_cache=False).logits, expected)
    assert isinstance(clone.model.layers[0].self_attn.k_proj.down, nn.Linear)
    assert clone.model.layers[0].self_attn.k_proj.down is clone.model.layers[0].self_attn.q_proj.down
