"""A model of which one block at a time has its weights in memory, read lazily from safetensors."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from corank.errors import CorankError
from corank.factors import put_together, take_apart
from corank.model.names import match
from corank.model.outline import model_class, narrow_as_stored, outline
from corank.model.resident import Batch, Call, Inputs, ResidentModel

__all__ = ["Call", "Inputs", "NotStreamable", "ResidentModel", "StreamedModel", "tensor_files"]


#: what safetensors calls the dtypes that weights come in
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class NotStreamable(CorankError):
    """The model does not run block by block, or its files do not hold what it consists of; load it as a whole."""


ALIGNMENT = 64


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where PyTorch would have put it: the last bit of a product depends on where its operands begin."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


class StreamedModel(ResidentModel):
    """Blocks of a checkpoint directory; only the block in use has weights.

    Args:
        path: a directory with config.json and safetensors files (one, or sharded with an index).
        device: where blocks are computed.
        dtype: dtype of the computation; default: float32 on the CPU, the checkpoint's elsewhere.
        example: model inputs of the shapes that will come; default: by the configuration.

    Raises:
        NotStreamable: the model does not run block by block, or a tensor of it is not in the files.
        CorankError: a file is missing, truncated or corrupt.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        example: Batch | None = None,
    ):
        self.path = Path(path)
        config = AutoConfig.from_pretrained(self.path)
        self.files = tensor_files(self.path)
        plan = outline(config, example=example)
        if plan.whole:
            raise NotStreamable(
                f"{model_class(config).__name__} does not run as one chain of blocks; it is loaded as a whole."
            )
        with init_empty_weights(include_buffers=False):
            model = model_class(config)(config)
            narrow_as_stored(model, config)
        model.tie_weights()
        super().__init__(model, plan)
        self.device = torch.device(device)
        self.stored_dtype = self._stored_dtype()
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else self.stored_dtype)
        self.model.to(dtype=self.dtype)  # meta parameters and real buffers alike
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        self._restore_buffer_precision()
        self.keys = match(self.model, self.files)
        self._check_complete()

    def _restore_buffer_precision(self) -> None:
        """Buffers are built in float32 (rotary frequencies); a cast to bfloat16 would damage them."""
        if self.dtype == torch.float32:
            return
        with init_empty_weights(include_buffers=False):
            fresh = type(self.model)(self.config)
        for name, buffer in fresh.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _stored_dtype(self) -> torch.dtype:
        """Dtype of the first stored tensor of numbers."""
        with _Files(self.files) as files:
            for key in self.files:
                dtype = files.dtype(key)
                if dtype is not None:
                    return dtype
        raise CorankError(f"{self.path} holds no floating-point weights; start from the dense model.")

    def _check_complete(self) -> None:
        tied = self.model.all_tied_weights_keys
        ties = {*tied, *tied.values()}
        for name, _ in self.model.named_parameters():
            if name not in self.keys and name not in ties:
                raise NotStreamable(f"The checkpoint {self.path} stores no {name}; load it as a whole.")

    def read(self, name: str) -> Tensor:
        """One tensor of the checkpoint, by the model's name for it, as stored."""
        with _Files(self.files) as files:
            return self.keys[name].read(name, files.get, self.model)

    def stored(self, key: str) -> Tensor:
        """One tensor by its name in the files."""
        with _Files(self.files) as files:
            return files.get(key)

    def _materialise(
        self, module: nn.Module, prefix: str, skip: tuple[nn.Module, ...] = ()
    ) -> list[tuple[nn.Module, str]]:
        filled = []
        with _Files(self.files) as files:
            for path, child in module.named_modules(prefix=prefix):
                if child in skip:
                    continue
                for leaf in [*child._parameters, *child._buffers]:
                    name = f"{path}.{leaf}" if path else leaf
                    if name not in self.keys:
                        continue
                    if leaf in child._buffers:
                        child._buffers[leaf] = self.keys[name].read(name, files.get, self.model).to(self.device)
                    elif (parameter := child._parameters[leaf]) is not None and parameter.is_meta:
                        value = aligned(self.keys[name].read(name, files.get, self.model).to(self.device, self.dtype))
                        child._parameters[leaf] = nn.Parameter(value, requires_grad=False)
                        filled.append((child, leaf))
        return filled

    @staticmethod
    def _release(filled: list[tuple[nn.Module, str]]) -> None:
        for module, leaf in filled:
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """The block with its weights read from disk; they are dropped again at the end."""
        if layer == self.outline.layers:
            with self.outside(head=True):
                yield self.model
            return
        block = self._block(layer)
        filled = self._materialise(block, self.outline.path(layer))
        take_apart(block)
        try:
            yield block
        finally:
            put_together(block)
            self._release(filled)
            return_free_memory()

    @contextlib.contextmanager
    def outside(self, head: bool) -> Iterator[None]:
        """Read what lies around the blocks; the output embedding only if `head` (or if it is tied)."""
        blocks = tuple(self.model.get_submodule(self.outline.blocks).modules())
        output = self.model.get_output_embeddings()
        skip = blocks if head or output is None else (*blocks, output)
        filled = self._materialise(self.model, "", skip)
        self.model.tie_weights()
        try:
            yield
        finally:
            self._release(filled)
            with contextlib.suppress(ValueError, AttributeError):  # a pair that has been factorized has nothing to tie
                self.model.tie_weights()
            return_free_memory()


class _Files:
    """Safetensors files, each opened when it is first needed."""

    def __init__(self, files: dict[str, Path]):
        self._files, self._open = files, contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def _handle(self, key: str) -> Any:
        file = self._files[key]
        if file not in self._handles:
            self._handles[file] = self._open.enter_context(_open(file))
        return self._handles[file]

    def get(self, key: str) -> Tensor:
        """A tensor by its name in the files."""
        handle = self._handle(key)
        try:
            return handle.get_tensor(key)
        except SafetensorError as error:
            raise _damaged(self._files[key], error) from None

    def dtype(self, key: str) -> torch.dtype | None:
        """Dtype of a tensor, None if it is not of floating point; nothing is read."""
        return _FLOATS.get(self._handle(key).get_slice(key).get_dtype())


def return_free_memory() -> None:
    """Hand memory that was freed back to the system.

    The C library keeps what is freed between blocks and, fragmented, does not find it again: a run over many blocks grows
    by a block at a time although nothing is alive. Elsewhere than on glibc this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> CorankError:
    return CorankError(f"{file} is truncated or corrupt ({error}); download or copy it again.")


def tensor_files(path: Path) -> dict[str, Path]:
    """Name of every tensor of a checkpoint directory -> the safetensors file that holds it.

    Raises:
        CorankError: no safetensors there, a shard is missing, or a file is truncated.
    """
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        mapping = json.loads(index.read_text())["weight_map"]
        for file in sorted(set(mapping.values())):
            if not (path / file).is_file():
                raise CorankError(f"{path} lacks the shard {file} that its index names; download or copy it again.")
            with _open(path / file):
                pass
        return {key: path / file for key, file in mapping.items()}
    if single.is_file():
        with _open(single) as tensors:
            return {key: single for key in tensors.keys()}  # noqa: SIM118
    if list(path.glob("*.bin")):
        raise CorankError(
            f"{path} holds PyTorch .bin weights only; convert them once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), which writes safetensors."
        )
    raise CorankError(f"{path} has a config.json but no model.safetensors; it is not a complete model directory.")
