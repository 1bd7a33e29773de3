"""What the model of `test_export.py` does not hold, through ONNX Runtime and torch.export: pivoted columns and biases,
layers that stored their weights transposed, embeddings in factors, factors as integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from corank import checkpoint
from corank.errors import CorankError
from corank.factors import FactorizedEmbedding, replace, weight_of
from corank.serve.export import export
from corank.serve.onnx import session
from factorized import IDS, compressed, factors_of, logits, tied_in_factors
from tiny import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def columns_and_ends():
    """Pivoted columns with biases; an embedding and a head with factors of their own."""
    model = compressed("column_pivoted", "qwen2-bias", ranks=(5, 3, 4))
    model.config.layer_types = model.config.layer_types[:1]
    table = model.model.embed_tokens
    model.model.embed_tokens = FactorizedEmbedding.replacing(table, factors_of("low_rank", table.weight.detach().T, 6))
    replace(model, "lm_head", factors_of("low_rank", weight_of(model.lm_head), 9).module())
    return model


def transposed():
    """GPT-2, whose layers have biases and store [in, out]; its dense embedding is tied."""
    return compressed("row_pivoted", "gpt2-conv1d", ranks=(5, 3, 4))


def one_tied_pair():
    """An embedding that reads the head's factors."""
    model = tied_in_factors()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize("build", [columns_and_ends, transposed, one_tied_pair])
def test_onnx_runtime_and_torch_export_give_the_logits(build, tmp_path):
    model = build()
    due = logits(model)
    checkpoint.save(model, tokenizer(), tmp_path / "small")
    done = export(tmp_path / "small", "onnx", tmp_path / "onnx")
    run = session(tmp_path / "onnx" / "model.onnx")
    (found,) = run.run(None, {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()})
    assert torch.from_numpy(found).sub(due).abs().max() <= 1e-4 * max(1.0, float(due.abs().max()))
    assert done.initializers < done.densified and done.optimized - done.copied < done.densified
    export(tmp_path / "small", "torch", tmp_path / "torch")
    program = torch.export.load(tmp_path / "torch" / "model.pt2").module()
    torch.testing.assert_close(program(IDS, torch.ones_like(IDS)), due, rtol=1e-5, atol=1e-5)


def test_experts_in_factors_are_refused_in_one_sentence_and_made_dense(tmp_path, capfd):
    golden = Path(__file__).resolve().parents[1] / "checkpoint" / "golden" / "v1" / "experts"
    model, _ = checkpoint.load(golden, tokenizer=False)
    due = model(IDS[:, :8] % 16).logits
    checkpoint.save(model, tokenizer(), tmp_path / "small")
    for format in ("onnx", "torch"):
        with pytest.raises(CorankError, match="routed to them, which one fixed graph cannot hold; --format dense"):
            export(tmp_path / "small", format, tmp_path / "out")
    assert capfd.readouterr().err.count("\n") < 3 and not (tmp_path / "out").exists()  # torch would print its graph
    export(tmp_path / "small", "dense", tmp_path / "dense")
    dense, _ = checkpoint.load(tmp_path / "dense")
    torch.testing.assert_close(dense(IDS[:, :8] % 16).logits, due, rtol=1e-3, atol=1e-4)


def test_factors_as_integers(tmp_path):
    """Multiplied out the rounded factors are an ordinary model; as a program they compute what the model computes."""
    pytest.importorskip("torchao")
    model = compressed("low_rank", ranks=(5, 3, 4))
    checkpoint.quantize_factors(model, "int8")
    due = logits(model)
    checkpoint.save(model, tokenizer(), tmp_path / "small")
    export(tmp_path / "small", "dense", tmp_path / "dense")
    torch.testing.assert_close(logits(checkpoint.load(tmp_path / "dense")[0]), due, rtol=1e-3, atol=1e-3)
    export(tmp_path / "small", "torch", tmp_path / "torch")
    program = torch.export.load(tmp_path / "torch" / "model.pt2").module()
    torch.testing.assert_close(program(IDS, torch.ones_like(IDS)), due, rtol=1e-5, atol=1e-5)
