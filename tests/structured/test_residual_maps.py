"""A basis of its own at every place of the residual stream: exact at full width, stored through the door, counted with its maps."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from test_width_methods import IDS, compress, logits
from test_width_residual import CLOSE, FAMILIES, qwen3, randn, task_of, with_gains

import corank
from corank.errors import CorankError
from corank.structured.maps import MAPS, is_mapped, parameters_of
from corank.structured.rotations import rotate_each
from tiny import saved, tiny, tokenizer

EACH = {"rotations": "each", "multiple": 2}


def close(found, wanted):
    return torch.allclose(found, wanted, rtol=0, atol=CLOSE * float(wanted.abs().max()))


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3"])
def test_other_bases_everywhere_are_the_same_model(name, monkeypatch):
    """Full width, with a random basis in place of the identity wherever nothing is cut but at the last place."""
    model = with_gains(tiny(name, dtype=torch.float64) if name != "qwen3" else qwen3())
    before = logits(model)
    count = iter(range(100))
    places = 2 * model.config.num_hidden_layers + 1
    tied = name == "llama-tied"

    def basis(gram, width, shares):
        i = next(count)
        end = i == places - 1 or (tied and i == 0)
        return torch.eye(width, dtype=torch.float64) if end else torch.linalg.qr(randn(24, 24, seed=i)).Q

    monkeypatch.setattr("corank.structured.rotations._basis", basis)
    rotate_each(task_of(model), [24] * places)
    if not tied and not model.config.tie_word_embeddings:  # the first place is in another basis: so is the embedding
        first = torch.linalg.qr(randn(24, 24, seed=0)).Q
        embedding = model.get_input_embeddings()
        embedding.weight = torch.nn.Parameter(embedding.weight @ first)
    assert next(count) == places and is_mapped(model)
    assert close(logits(model), before)
    block = model.model.layers[1]
    for which, S in enumerate(getattr(block, m).weight for m in MAPS):
        assert torch.allclose(S @ S.T, torch.eye(24, dtype=torch.float64), atol=1e-10), which
    uncached = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True), uncached)


def in_planes(model, dims=14):
    """A model whose stream lies in subspaces that change from place to place, so that one basis would not do."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0)
        basis = torch.linalg.qr(randn(24, 24, seed=2)).Q
        model.model.embed_tokens.weight.copy_(randn(64, 4, seed=3) @ basis[:, :4].T)
        for i, layer in enumerate(model.model.layers):
            for j, producer in enumerate((layer.self_attn.o_proj, layer.mlp.down_proj)):
                at = 4 + 2 * (2 * i + j)
                plane = basis[:, at : at + 2]
                producer.weight.copy_(plane @ plane.T @ producer.weight)
    return model


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied"])
def test_what_lies_in_subspaces_is_cut_without_loss_and_comes_back(name, tmp_path):
    model = in_planes(with_gains(tiny(name, dtype=torch.float64)))
    before, dense = logits(model), copy.deepcopy(model)
    report = compress(model, "slicegpt", tmp_path / "out", keep=0.95, **EACH)
    widths = report.extra["structure"]["residual"]
    tied = name == "llama-tied"
    assert len(widths) == 7 and widths[-1] == 24 and (widths[0] == 24) == tied and 16 <= widths[1] < 24
    assert report.extra["structure"]["energy"] == pytest.approx(1.0, abs=1e-9)
    assert close(logits(model), before)
    assert report.extra["structure"]["class"] == "N4" and not report.ordinary
    # every stored value is counted, maps included
    matrices = [p for b in model.model.layers for n, p in b.named_parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == sum(row["params"] for row in report.sites)
    assert sum(p.numel() for p in matrices) <= 0.95 * sum(row["params_dense"] for row in report.sites)
    assert sum(p.numel() for p in model.parameters()) == report.accounting["model"]["compressed"]
    shapes = [
        {"q": (24, 24), "k": k, "v": k, "o": (24, 24), "gate": (37, 24), "up": (37, 24), "down": (24, 37)}
        for k in [tuple(layer.self_attn.k_proj.weight.shape) for layer in dense.model.layers]
    ]
    assert parameters_of(shapes, widths) == sum(p.numel() for p in matrices)
    loaded, _ = corank.load(tmp_path / "out", dtype=torch.float64)
    assert torch.equal(logits(loaded), logits(model)) and is_mapped(loaded)
    assert type(loaded) is type(model) and loaded.config.tie_word_embeddings == tied
    corank.verify(tmp_path / "out")
    uncached = loaded.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True), uncached)
    loaded.save_pretrained(tmp_path / "again")
    tokenizer().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(corank.load(tmp_path / "again", dtype=torch.float64)[0]), logits(model))
    if not tied:
        bare = tf.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float64)  # without the head
        hidden = bare(IDS, output_hidden_states=True).hidden_states
        assert [h.shape[-1] for h in hidden] == [*widths[0:-1:2], 24]
    with pytest.raises(CorankError, match="rotations=one"):
        corank.dequantize(loaded)


def test_each_place_loses_what_its_trailing_eigenvalues_say():
    """At one width the discarded energy of a place is the sum of the trailing eigenvalues of what is there."""
    from corank.statistics import InputGram
    from corank.structured.rotations import _basis

    X = randn(300, 12, seed=5) @ randn(12, 12, seed=6)
    gram, shares = InputGram(12), []
    gram.update(X[None])
    Q = _basis(gram, 7, shares)
    lost = (X - X @ Q @ Q.T).square().sum()
    assert shares[0] == pytest.approx(1 - float(lost / X.square().sum()), rel=1e-9)
    assert torch.allclose(Q.T @ Q, torch.eye(7, dtype=torch.float64), atol=1e-12)


def test_from_disk_to_disk_and_bad_input(tmp_path):
    source = saved("llama-tied", tmp_path / "dense", dtype=torch.bfloat16)
    compress(str(source), "slicegpt", tmp_path / "out", keep=0.8, rotations="each")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 24 and "auto_map" not in config
    loaded, _ = corank.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and torch.isfinite(logits(loaded)).all()
    with pytest.raises(RuntimeError, match="mismatch"):  # as loud as can be without corank's door
        stock = {k: v for k, v in config.items() if k != "quantization_config"}
        (tmp_path / "out" / "config.json").write_text(json.dumps(stock))
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wrong = json.loads(json.dumps(config))
    wrong["quantization_config"]["shape"]["residual"].pop()
    (tmp_path / "out" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(CorankError, match="6 widths of the residual stream for 3 blocks"):
        corank.load(tmp_path / "out")
    with pytest.raises(CorankError, match="kind of rotations"):
        compress(tiny("llama-gqa"), "slicegpt", keep=0.8, rotations="some")
    with pytest.raises(CorankError, match="leaves nothing"):
        compress(tiny("llama-gqa"), "slicegpt", keep=0.05, rotations="each")
    with pytest.raises(CorankError, match="families llama"):
        compress(tiny("gpt2-conv1d"), "slicegpt", keep=0.8, rotations="each")
    model = tiny("llama-gqa", dtype=torch.float64)
    before = logits(model)
    compress(model, "slicegpt", keep=1.0, rotations="each")
    assert torch.equal(logits(model), before) and not is_mapped(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_model_may_be_what_counts(name):
    model = tiny(name)
    dense = sum(p.numel() for p in model.parameters())
    report = compress(model, "slicegpt", keep=0.8, scope="model", rotations="each", multiple=1)
    after = sum(p.numel() for p in model.parameters())
    assert after == report.accounting["model"]["compressed"] <= 0.8 * dense < after * 1.12
