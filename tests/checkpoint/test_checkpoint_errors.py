"""One clear sentence for whatever is wrong, and never a half-written or randomly filled model."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from checkpoint_models import compress, make, outputs, tokenizer
from safetensors.torch import load_file, save_file

from corank import checkpoint
from corank.checkpoint import CorankConfig
from corank.errors import CorankError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "out"
    checkpoint.save(compress(make("llama")), tokenizer(), folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def redigest(folder):
    """Make the digests agree with tampered files, so that only the later checks are left."""
    from corank.checkpoint.verify import digests, weight_files

    edit(folder, lambda c: c["quantization_config"].update(files=digests(weight_files(folder))))


def both(folder, match):
    with pytest.raises(CorankError, match=match) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(CorankError, match=match):
        checkpoint.verify(folder)


def test_not_a_model_directory(tmp_path):
    both(tmp_path / "nothing", "not a directory")
    both(tmp_path, "not a model directory: it has no config.json")
    (tmp_path / "config.json").write_text("{")
    both(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    both(tmp_path, "not a JSON object")


def test_newer_format(folder):
    edit(folder, lambda c: c["quantization_config"].update(format_version=2))
    both(folder, "format 2 .* upgrade with `pip install -U corank`")
    with pytest.raises(CorankError, match="upgrade"):
        type(make("llama")).from_pretrained(folder)


def test_reserved_field():
    with pytest.raises(CorankError, match="upgrade"):
        CorankConfig(factor_quantization={"bits": 4})


def test_missing_shard(folder):
    shard(folder).unlink()
    both(folder, "model-00001-of-.*is missing")


def test_missing_weights(folder):
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    both(folder, "has no safetensors weights")


def test_corrupt_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    both(folder, "index.json is corrupt")


def test_truncated_file(folder):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[: len(data) // 2])
    both(folder, "model-00001-of-.*corrupt or truncated")


def test_flipped_bit(folder):
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(bytes(data))
    both(folder, "model-00001-of-.*SHA-256")


def test_changed_factors_under_a_valid_digest(folder):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors:
            if ".down.weight" in key:
                tensors[key] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})
    redigest(folder)
    with pytest.raises(CorankError, match="proj: the factors in memory"):
        checkpoint.load(folder)
    with pytest.raises(CorankError, match="proj: the stored factors"):
        checkpoint.verify(folder)
    with pytest.raises(CorankError, match="proj: the factors in memory"):
        type(make("llama")).from_pretrained(folder)


def test_tensors_lost_from_the_files(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = "model.layers.1.mlp.down_proj.up.weight"
    file = folder / index["weight_map"][lost]
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    redigest(folder)
    with pytest.raises(CorankError, match="down_proj"):
        checkpoint.load(folder)
    with pytest.raises(CorankError, match=f"no {lost}"):
        checkpoint.verify(folder)


def test_dense_tensors_lost_or_of_another_shape(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    kept = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    redigest(folder)
    with pytest.raises(CorankError, match="lacks 1 parameters .*model.norm.weight"):
        checkpoint.load(folder)
    save_file({**tensors, "model.norm.weight": kept[:5].clone()}, file, metadata={"format": "pt"})
    redigest(folder)
    with pytest.raises(CorankError, match=r"model.norm.weight has shape \[5\]"):
        checkpoint.load(folder)


def test_config_of_another_model(folder):
    edit(folder, lambda c: c.update(hidden_size=16))
    with pytest.raises(CorankError, match="does not belong to these weights"):
        checkpoint.load(folder)


def test_unknown_kind(folder):
    modules = checkpoint.collect(compress(make("llama")))
    name = next(iter(modules))
    edit(folder, lambda c: c["quantization_config"]["modules"][name].update(kind="low_rnk"))
    both(folder, "Unknown kind of factors 'low_rnk'; nearest: low_rank")


def test_missing_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CorankError, match="has no tokenizer"):
        checkpoint.load(folder)
    model, words = checkpoint.load(folder, tokenizer=False)
    assert words is None and model is not None


def test_unknown_architecture(folder):
    edit(folder, lambda c: c.update(model_type="nothing", architectures=["NothingForCausalLM"]))
    with pytest.raises(CorankError, match="Could not load"):
        checkpoint.load(folder)


def test_verify_a_model(folder):
    model, _ = checkpoint.load(folder)
    checkpoint.verify(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.up.weight[0, 0] = float("nan")
    with pytest.raises(CorankError, match="self_attn.q_proj"):
        checkpoint.verify(model)
    with pytest.raises(CorankError, match="not compressed by corank"):
        checkpoint.verify(make("llama"))
    fresh = compress(make("llama"))
    checkpoint.attach(fresh)
    with pytest.raises(CorankError, match="save it first"):
        checkpoint.verify(fresh)


def test_compressing_is_not_loading(tmp_path):
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        type(make("llama")).from_pretrained(tmp_path, quantization_config=CorankConfig())


# Saving: all or nothing


def test_target_must_be_absent_or_empty(tmp_path):
    model = compress(make("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(CorankError, match="not an empty directory"):
            checkpoint.save(model, None, tmp_path / name)
    assert (tmp_path / "full" / "precious").read_text() == "x"
    (tmp_path / "empty").mkdir()
    checkpoint.save(model, None, tmp_path / "empty")
    checkpoint.verify(tmp_path / "empty")
    checkpoint.save(model, None, tmp_path / "made" / "on" / "the" / "way")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    model, words = compress(make("llama")), tokenizer()

    def fail(folder, **kwargs):
        assert list(folder.glob("*.safetensors"))  # the weights are written by now
        raise failure

    monkeypatch.setattr(words, "save_pretrained", fail)
    expected = CorankError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        checkpoint.save(model, words, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(CorankError, match="Not enough room"):
        checkpoint.save(compress(make("llama")), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_leftovers(tmp_path):
    model = compress(make("llama"))
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    with pytest.raises(CorankError, match="unfinished run"):
        checkpoint.save(model, None, tmp_path / "out")
    assert (partial / "state.json").exists()
    (partial / ".corank-save").touch()  # a killed save leaves this mark: nobody can resume that, so it may go
    checkpoint.save(model, None, tmp_path / "out")
    assert not partial.exists() and not (tmp_path / "out" / "state.json").exists()


def test_factors_that_are_not_finite_are_not_saved(tmp_path):
    model = compress(make("llama"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.up.weight[0, 0] = float("inf")
    with pytest.raises(CorankError, match="q_proj: the factors hold NaN or infinite values"):
        checkpoint.save(model, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_loading_does_not_depend_on_the_name_of_the_folder(folder, tmp_path):
    moved = folder.rename(tmp_path / "a b.c")
    model, _ = checkpoint.load(moved)
    assert torch.equal(outputs(model), outputs(compress(make("llama"))))
