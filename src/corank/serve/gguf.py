"""GGUF, through a dense checkpoint and llama.cpp's own converter: llama.cpp has no factorized linear layer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from corank import checkpoint
from corank.errors import CorankError
from corank.serve.export import Export, Step, count

#: Programs that llama.cpp installs, by its Python package and by its distribution; and the module behind them.
PROGRAMS = ("llama-convert-hf-to-gguf", "convert_hf_to_gguf.py", "convert_hf_to_gguf")
MODULE = "convert_hf_to_gguf"
PACKAGE = "llama-cpp-python"
"""On the package index; its source distribution contains those of llama.cpp."""


def converter() -> list[str] | None:
    """The command of the converter that is installed here or lies in the directory ``$LLAMA_CPP``, or None.

    Raises:
        CorankError: ``$LLAMA_CPP`` is set, and there is no converter in it.
    """
    sources = os.environ.get("LLAMA_CPP")
    if sources:
        script = Path(sources).expanduser() / f"{MODULE}.py"
        if not script.is_file():
            raise CorankError(f"There is no {script.name} in {sources}; set LLAMA_CPP to the sources of llama.cpp.")
        return [sys.executable, str(script)]
    for name in PROGRAMS:
        beside = Path(sys.executable).with_name(name)
        found = shutil.which(name) or (str(beside) if beside.is_file() else None)
        if found:
            return [sys.executable, found] if found.endswith(".py") else [found]
    return [sys.executable, "-m", MODULE] if importlib.util.find_spec(MODULE) else None


def to_gguf(path: Path, target: Path, step: Step) -> Export:
    """Convert a model to one GGUF file.

    Args:
        path: model directory, compressed (it is multiplied out) or dense.
        target: file name ending in ``.gguf`` that does not exist.
        step: progress.

    Raises:
        CorankError: no converter is installed, it failed, or the target exists; nothing is left behind.
    """
    if target.suffix != ".gguf":
        raise CorankError(f"{target} is no name for a GGUF file; give --out NAME.gguf.")
    if target.exists():
        raise CorankError(f"{target} exists already; give another name.")
    command = converter()
    if command is None:
        raise CorankError(
            "GGUF files are made by llama.cpp's converter, which is not installed here; it is in the sources of the package "
            f"{PACKAGE}, so run: pip download --no-deps --no-binary :all: {PACKAGE} && tar xf llama_cpp_python-*.tar.gz && "
            f"LLAMA_CPP=$(echo llama_cpp_python-*/vendor/llama.cpp) corank export {path} --format gguf --out {target}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        step("export to gguf", 0, 2)
        model, tokenizer = checkpoint.load(path)
        parameters = count(checkpoint.dequantize(model))
        plain = checkpoint.save(model, tokenizer, Path(scratch) / "dense")
        del model
        step("export to gguf", 1, 2)
        made = Path(scratch) / "model.gguf"
        result = subprocess.run(
            [*command, str(plain), "--outfile", str(made)], capture_output=True, text=True, check=False
        )
        if result.returncode or not made.is_file():
            said = (result.stderr.strip() or result.stdout.strip() or "no reason given").splitlines()[-1]
            raise CorankError(f"{Path(command[-1]).name} could not convert {path}: {said}")
        with open(made, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CorankError(f"{Path(command[-1]).name} wrote something that is no GGUF file.")
        os.replace(made, target)
    step("export to gguf", 2, 2)
    return Export("gguf", target, {target.name: target.stat().st_size}, parameters)
