"""Bad input: one clear sentence, exit code 2, nothing written and nothing overwritten."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import corank
from corank.cli import main
from tiny import saved, text


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved("llama-gqa", tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(text())
    return file


@pytest.fixture
def refused(dense, words, tmp_path, capsys):
    """Run compress with some arguments; it must fail with one sentence and leave nothing behind."""

    def run(*arguments, model=dense, out=None, mention=()):
        out = out or tmp_path / "out"
        before = sorted(p.name for p in tmp_path.iterdir())
        code = main(
            [
                "compress",
                str(model),
                "--out",
                str(out),
                "--data",
                str(words),
                "--samples",
                "4",
                "--length",
                "16",
                "--no-eval",
                "--quiet",
                *arguments,
            ]
        )
        said = capsys.readouterr()
        assert code == 2
        assert said.out == "" and said.err.startswith("corank: ") and said.err.count("\n") == 1
        for word in mention:
            assert word in said.err
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return said.err

    return run


@pytest.mark.parametrize(
    "arguments,mention",
    [
        (["--method", "svd-lm", "--keep", "0.8"], ["svd-llm"]),
        (["--keep", "0.8", "--targets", "gates"], ["gate"]),
        (["--keep", "0.8", "--targets", "re:nothing"], ["role or site"]),
        (["--keep", "0.8", "--set", "allocate=lagrang"], ["lagrange"]),
        (["--keep", "0.8", "--set", "sellector=qr", "--method", "col-id"], ["selector"]),
        (["--keep", "0.8", "--set", "selector=qrr", "--method", "col-id"], ["qr"]),
        (["--keep", "0.8", "--set", "alpha"], ["NAME=VALUE"]),
        (["--keep", "0.8", "--method", "asvd", "--set", "alpha=much"], ["float"]),
        (["--keep", "0"], ["(0, 1]"]),
        (["--keep", "1.5"], ["(0, 1]"]),
        (["--keep", "0.8", "--remove", "0.2"], ["keep and remove"]),
        ([], ["exactly one"]),
        (["--keep", "0.0001", "--method", "curing"], ["no less than"]),
        (["--params", "10"], ["not compressed"]),
        (["--bytes", "ten"], ["bytes"]),
        (["--keep", "0.8", "--samples", "100000"], ["windows", "fewer samples"]),
        (["--keep", "0.8", "--data", "missing.txt"], ["no text file"]),
        (["--keep", "0.8", "--dtype", "int8"], ["floating-point"]),
        (["--keep", "0.8", "--recipe", "missing.yaml"], ["no recipe file"]),
    ],
)
def test_arguments(refused, arguments, mention):
    refused(*arguments, mention=mention)


def test_a_bare_ratio_is_not_understood(dense, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["compress", str(dense), "0.8", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    with pytest.raises(TypeError):
        corank.compress(dense, "svd-llm", 0.8, out=tmp_path / "out")  # type: ignore[misc]


def test_an_output_directory_that_is_not_empty_is_left_alone(refused, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    refused("--keep", "0.8", out=out, mention=["not empty"])
    assert (out / "precious").read_text() == "data"


def test_not_a_model(refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    refused("--keep", "0.8", model=folder, mention=["not a model directory"])
    refused("--keep", "0.8", model="no-such-thing", mention=["smollm2-135m"])
    refused("--keep", "0.8", model=folder / "x.gguf", mention=["GGUF"])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_weights(refused, damage, tmp_path_factory):
    folder = saved("llama-gqa", tmp_path_factory.mktemp("damaged"))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"garbage" * 10)
    refused("--keep", "0.8", model=folder, mention=["model.safetensors"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(refused, value, tmp_path_factory):
    folder = saved("llama-gqa", tmp_path_factory.mktemp("nan"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("--keep", "0.8", "--method", "svd", model=folder, mention=["layer 1"])


def test_a_missing_tokenizer(refused, tmp_path_factory):
    folder = saved("llama-gqa", tmp_path_factory.mktemp("mute"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused("--keep", "0.8", model=folder, mention=["tokenizer"])


def test_a_compressed_model_is_not_compressed_again(refused, dense, tmp_path_factory):
    small = tmp_path_factory.mktemp("small") / "m"
    corank.compress(dense, "svd", keep=0.8, out=small)
    refused("--keep", "0.8", model=small, mention=["already"])


@pytest.mark.parametrize("change", ["newer", "digest"])
def test_loading_checks_version_and_digest(dense, change, tmp_path, capsys):
    small = tmp_path / "small"
    corank.compress(dense, "svd", keep=0.8, out=small)
    if change == "newer":
        config = json.loads((small / "config.json").read_text())
        config["quantization_config"]["format_version"] = 99
        (small / "config.json").write_text(json.dumps(config))
    else:
        weights = load_file(small / "model.safetensors")
        name = next(n for n in weights if n.endswith("down.weight"))
        weights[name] += 1
        save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    for command in (["verify", str(small)], ["eval", str(small), "--quiet"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("corank: ") and ("upgrade" in said if change == "newer" else "model.safetensors" in said)


def test_a_full_disk_leaves_no_target_and_the_run_can_continue(dense, words, tmp_path, monkeypatch):
    import errno

    from corank.engine import directory

    original = directory.save_file

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = dict(keep=0.8, out=tmp_path / "out", data=words, samples=4, length=16)
    monkeypatch.setattr(directory, "save_file", full)
    with pytest.raises(corank.CorankError, match="disk is full"):
        corank.compress(dense, "svd-llm", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(directory, "save_file", original)
    corank.compress(dense, "svd-llm", **options)
    model, _ = corank.load(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()
