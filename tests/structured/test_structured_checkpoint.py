"""What structured methods write: plain checkpoints where there is a configuration for them, and the door where there is none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from depth_cases import DATA, four_blocks, logits, some_ids
from safetensors import safe_open

import corank
from corank.errors import CorankError
from corank.structured import driver, native
from corank.structured.shape import BlockShape, Shape
from tiny import saved, tiny, tokenizer

LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        with torch.no_grad():
            found = model(input_ids=torch.tensor([[3, 9, 27, 17, 51]])).logits[0, -1, :6].double().tolist()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(found))
assert "corank" not in sys.modules
"""


def without_corank(*paths):
    """For each directory the last logits, or the error, in a process that never imports corank."""
    command = [sys.executable, "-c", LOADER, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return [json.loads(line) for line in done.stdout.splitlines()]


def last_logits(model):
    return logits(model, torch.tensor([[3, 9, 27, 17, 51]]))[0, -1, :6].double().tolist()


def keys_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return found


def test_plain_results_load_without_corank_and_others_say_that_they_do_not(tmp_path):
    cases = {
        "dropped": ("llama-gqa", "shortgpt", {"keep": 0.7}),
        "tied": ("llama-tied", "angular", {"keep": 0.7}),
        "biased": ("qwen2-bias", "wanda-sp", {"keep": 0.8}),
        "gpt2": ("gpt2-conv1d", "wanda-sp", {"keep": 0.8, "attention": False}),
        "one width": ("llama-gqa", "flap", {"keep": 0.7, "uniform": True}),
        "channels": ("llama-gqa", "modegpt", {"keep": 0.8, "uniform": True}),
        "smaller heads": ("llama-gqa", "modegpt", {"keep": 0.5, "uniform": True}),
        "smaller stream": ("llama-tied", "slicegpt", {"keep": 0.7}),
        "own widths": ("llama-gqa", "flap", {"keep": 0.7}),
    }
    folders, expected = [], []
    for name, (model, method, settings) in cases.items():
        saved(model, tmp_path / f"{name}-dense")
        report = corank.compress(tmp_path / f"{name}-dense", method, out=tmp_path / name, **settings, **DATA)
        folders.append(tmp_path / name)
        expected.append((report.extra["structure"]["class"], last_logits(corank.load(tmp_path / name)[0])))
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert ("quantization_config" in config) == (name == "own widths")
        assert report.kept() <= settings["keep"]
    found = without_corank(*folders)
    assert [kind for kind, _ in expected] == ["N0", "N0", "N0", "N0", "N1", "N0", "N0", "N0", "N2"]
    for (kind, wanted), got in zip(expected, found, strict=True):
        if kind == "N2":
            assert isinstance(got, str) and ("size mismatch" in got or "mismatched" in got or "quantiz" in got), got
        else:
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "method", "settings"),
    [
        ("llama-gqa", "flap", {}),  # with biases, which the configuration has to switch on
        ("llama-tied", "best", {"families": "narrow"}),
        ("qwen2-bias", "best", {"families": "narrow"}),  # heads with biases of their own
        ("gemma", "modegpt", {}),
        ("phi3-fused", "modegpt", {}),  # gate and up in one matrix
        ("gpt2-conv1d", "best", {"families": "narrow"}),
        ("opt", "modegpt", {}),
        ("llama-gqa", "best", {"families": "both"}),  # factors and widths
        ("llama-gqa", "lorap", {}),
    ],
)
def test_dequantize_gives_narrowed_blocks_their_old_widths_back(model, method, settings, tmp_path):
    """What is filled up with zeros computes the same, and is a plain checkpoint of the source's shape."""
    folder, ids = saved(model, tmp_path / "dense"), some_ids()
    corank.compress(folder, method, keep=0.75, out=tmp_path / "small", **settings, **DATA)
    small, _ = corank.load(tmp_path / "small", dtype=torch.float64)
    shape = small.config.quantization_config.shape["blocks"]
    assert len({(b["channels"], b["kv_heads"]) for b in shape}) > 1 or method == "lorap"
    expected = logits(small, ids)
    count = sum(p.numel() for p in small.parameters())
    plain = corank.dequantize(small)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-9, atol=1e-9)
    corank.checkpoint.save(plain, tokenizer(), tmp_path / "plain")
    assert "corank" not in (tmp_path / "plain" / "config.json").read_text()
    again, _ = corank.load(tmp_path / "plain", dtype=torch.float64)
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-9, atol=1e-9)
    source = dict(tiny(model).named_parameters())
    assert sum(p.numel() for p in again.parameters()) > count
    assert all(p.shape == source[n].shape for n, p in again.named_parameters() if n in source)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "gemma", "phi3-fused", "gpt2-conv1d", "opt", "bert"])
def test_from_disk_to_disk_gives_what_in_memory_gives(name, tmp_path):
    folder = saved(name, tmp_path / "dense", shard="20KB")
    words = tf.AutoTokenizer.from_pretrained(folder)
    model = tiny(name)
    inside = corank.compress(model, "shortgpt", keep=0.7, tokenizer=words, out=tmp_path / "memory", **DATA)
    streamed = corank.compress(folder, "shortgpt", keep=0.7, out=tmp_path / "disk", **DATA)
    assert inside.extra["structure"] == streamed.extra["structure"] and len(inside.extra["structure"]["kept"]) == 2
    assert inside.accounting["model"] == streamed.accounting["model"]
    ids = some_ids()
    for where in ("memory", "disk"):
        loaded, _ = corank.load(tmp_path / where)
        assert type(loaded) is type(model)
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
        assert sum(p.numel() for p in loaded.parameters()) == inside.accounting["model"]["compressed"]
    assert streamed.accounting["bytes"]["compressed"] == sum(
        f.stat().st_size for f in (tmp_path / "disk").glob("*.safetensors")
    )
    stored = keys_of(tmp_path / "disk")
    numbers = {key.split(".layers.")[1].split(".")[0] for key in stored if ".layers." in key}
    assert numbers <= {"0", "1"}


def test_names_of_the_files_are_kept_with_new_numbers(tmp_path):
    """GPT-2 is often stored without the prefix that the model has for its names."""
    folder = saved("gpt2-conv1d", tmp_path / "dense")
    tensors = {
        k.removeprefix("transformer."): v for k, v in tiny("gpt2-conv1d").state_dict().items() if "lm_head" not in k
    }
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    report = corank.compress(folder, "shortgpt", keep=0.7, out=tmp_path / "small", **DATA)
    stored = keys_of(tmp_path / "small")
    assert "h.1.attn.c_attn.weight" in stored and not any(key.startswith(("transformer.", "h.2.")) for key in stored)
    model = tiny("gpt2-conv1d")
    kept = report.extra["structure"]["kept"]
    model.transformer.h = torch.nn.ModuleList(model.transformer.h[i] for i in kept)
    small, _ = corank.load(tmp_path / "small")
    torch.testing.assert_close(logits(small, some_ids()), logits(model, some_ids()), rtol=0, atol=0)


def test_generation_with_a_cache_is_generation_without_one(tmp_path):
    """Blocks find their place in the cache by their number, and heads by counts that are told to the attention."""
    for method, settings in (("shortgpt", {}), ("flap", {}), ("flap", {"uniform": True})):
        for name in ("llama-gqa", "qwen2-bias", "phi3-fused") if method == "flap" else ("llama-gqa",):
            model = tiny(name)
            out = tmp_path / f"{method}-{name}-{len(settings)}"
            corank.compress(model, method, keep=0.7, tokenizer=tokenizer(), out=out, **settings, **DATA)
            for each in (model, corank.load(out)[0]):
                given = dict(
                    inputs=some_ids(1, (2, 5)), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
                )
                cached, plain = (each.generate(**given, use_cache=use) for use in (True, False))
                assert torch.equal(cached, plain) and cached.shape == (2, 11)


def test_blocks_of_different_widths_come_back_through_the_door(tmp_path):
    model = tiny("llama-gqa")
    report = corank.compress(model, "flap", keep=0.6, tokenizer=tokenizer(), out=tmp_path / "small", **DATA)
    widths = [BlockShape.from_dict(b) for b in report.extra["structure"]["blocks"]]
    assert len({w.channels for w in widths}) > 1 and report.extra["structure"]["class"] == "N2"
    small, _ = corank.load(tmp_path / "small")
    torch.testing.assert_close(logits(small, some_ids()), logits(model, some_ids()), rtol=0, atol=0)
    for width, block in zip(widths, small.model.layers, strict=True):
        assert block.mlp.gate_proj.out_features == width.channels == block.mlp.down_proj.in_features
        assert block.self_attn.q_proj.out_features == width.heads * width.head_dim
        assert block.self_attn.k_proj.out_features == width.kv_heads * width.head_dim
        assert block.self_attn.num_key_value_groups == width.heads // width.kv_heads
        assert type(block.mlp.down_proj) is torch.nn.Linear
    small.save_pretrained(tmp_path / "again")
    tokenizer().save_pretrained(tmp_path / "again")
    again, _ = corank.load(tmp_path / "again")
    torch.testing.assert_close(logits(again, some_ids()), logits(model, some_ids()), rtol=0, atol=0)
    corank.verify(tmp_path / "small")
    bare = tf.AutoModel.from_pretrained(tmp_path / "small")  # without the head, under other names
    assert [b.mlp.gate_proj.out_features for b in bare.layers] == [w.channels for w in widths]
    wrong = json.loads((tmp_path / "small" / "config.json").read_text())
    wrong["quantization_config"]["shape"]["blocks"].pop()
    (tmp_path / "small" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(CorankError, match="widths of 2 blocks and this model has 3"):
        corank.load(tmp_path / "small")


def test_a_head_count_that_llama_refuses_is_written_as_mistral(tmp_path):
    torch.manual_seed(0)
    model = four_blocks(num_attention_heads=8, num_key_value_heads=8, head_dim=4).float()
    report = corank.compress(
        model, "wanda-sp", keep=0.62, uniform=True, tokenizer=tokenizer(), out=tmp_path / "small", **DATA
    )
    width = BlockShape.from_dict(report.extra["structure"]["blocks"][0])
    assert 24 % width.heads, "the case is no case"
    small, _ = corank.load(tmp_path / "small")
    assert type(small) is tf.MistralForCausalLM and report.extra["structure"]["class"] == "N0"
    assert small.config.sliding_window is None and small.config.num_attention_heads == width.heads
    torch.testing.assert_close(logits(small, some_ids()), logits(model, some_ids()), rtol=1e-6, atol=1e-6)
    assert any("mistral" in w for w in report.warnings)
    model.save_pretrained(tmp_path / "own")  # the model in memory is a llama, which comes back through the door
    tokenizer().save_pretrained(tmp_path / "own")
    torch.testing.assert_close(logits(corank.load(tmp_path / "own")[0], some_ids()), logits(model, some_ids()))


def test_settings_with_one_entry_per_layer_lose_those_of_the_blocks_that_go():
    gemma = tf.Gemma2Config(num_hidden_layers=4, vocab_size=64, hidden_size=24, num_attention_heads=4, head_dim=6)
    assert native.shortened(gemma, (0, 3)).layer_types == [gemma.layer_types[0], gemma.layer_types[3]]
    smol = tf.SmolLM3Config(num_hidden_layers=8, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    short = native.shortened(smol, (2, 3, 7))
    assert short.no_rope_layers == [smol.no_rope_layers[i] for i in (2, 3, 7)] and len(short.layer_types) == 3
    assert type(short).from_dict(short.to_dict()).no_rope_layers == short.no_rope_layers
    neo = tf.GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]])
    assert type(neo).from_dict(native.shortened(neo, (1, 3)).to_dict()).attention_layers == ["local", "local"]
    moe = tf.Qwen2MoeConfig(num_hidden_layers=4, mlp_only_layers=[0, 3])
    assert native.shortened(moe, (1, 3)).mlp_only_layers == [1]
    assert smol.num_hidden_layers == 8 and len(smol.no_rope_layers) == 8
    scaled = tf.GPT2Config(n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(CorankError, match="scales its attention by the number of the block"):
        native.shortened(scaled, (0, 2))


def test_blocks_of_several_kinds_whose_pattern_is_broken_are_refused():
    sizes = dict(vocab_size=64, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config = tf.Qwen2MoeConfig(
        **sizes, intermediate_size=37, moe_intermediate_size=8, num_experts=4, decoder_sparse_step=2
    )
    wanted = native.sizes_of(config)
    kept = (0, 1, 3)
    result = {}
    for name, size in wanted.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        result[".".join(parts)] = size
    with pytest.raises(CorankError, match="of different kinds"):
        native.describe(config, Shape(kept), result)


def test_an_interrupted_run_keeps_its_plan_and_leaves_no_result(tmp_path, monkeypatch):
    folder = saved("llama-gqa", tmp_path / "dense")
    wanted = corank.compress(folder, "flap", keep=0.7, out=tmp_path / "wanted", **DATA)
    write, plans = driver.write_shards, []

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "write_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        corank.compress(folder, "flap", keep=0.7, out=tmp_path / "small", **DATA)
    assert not (tmp_path / "small").exists() and (tmp_path / "small.partial" / "plan.json").is_file()
    monkeypatch.setattr(driver, "write_shards", write)
    monkeypatch.setattr(driver, "make_plan", lambda task: plans.append(task))
    found = corank.compress(folder, "flap", keep=0.7, out=tmp_path / "small", **DATA)
    assert not plans and not (tmp_path / "small.partial").exists()
    assert found.extra["structure"] == wanted.extra["structure"] and found.sites == wanted.sites
    pair = [corank.load(tmp_path / name)[0] for name in ("small", "wanted")]
    torch.testing.assert_close(logits(pair[0], some_ids()), logits(pair[1], some_ids()), rtol=0, atol=0)


def test_models_that_are_no_chain_of_blocks_are_refused(tmp_path):
    sizes = dict(vocab_size=64, d_model=24, d_ff=37, d_kv=6, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = tf.T5ForConditionalGeneration(tf.T5Config(**sizes))
    with pytest.raises(CorankError, match="does not run as one chain of blocks"):
        corank.compress(model, "shortgpt", keep=0.5, tokenizer=tokenizer(), **DATA)
    model.save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(CorankError, match="does not run as one chain of blocks"):
        corank.compress(tmp_path / "t5", "shortgpt", keep=0.5, out=tmp_path / "out", **DATA)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_directory_is_as_complete_as_any(tmp_path):
    folder = saved("llama-gqa", tmp_path / "dense")
    corank.compress(folder, "mka", keep=0.7, out=tmp_path / "small", **DATA)
    names = {f.name for f in (tmp_path / "small").iterdir()}
    assert {"config.json", "model.safetensors", "report.json", "README.md", "tokenizer.json"} <= names
    card = (tmp_path / "small" / "README.md").read_text()
    assert "1 of its 3 blocks merged" in card and "import corank" not in card and "factors" not in card
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    report = corank.Report.load(tmp_path / "small")
    assert report.ordinary and all(sum(m.values()) == pytest.approx(1) for m in report.structure["merged"].values())
