"""A model as a sequence of blocks, of which one at a time has its weights in memory.

`StreamedModel` reads safetensors lazily; `ResidentModel` wraps a model that is in memory already. Both run
blocks through the model's own forward: its blocks are replaced for a moment by recorders, so that masks and
position embeddings are what the model itself would pass, for every architecture, without copying a line of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from corank.errors import CorankError
from corank.model.outline import Outline, model_class, outline

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Everything a block is called with besides the hidden state."""


class NotStreamable(CorankError):
    """The checkpoint's tensor names do not match the model's; it has to be loaded as a whole."""


class _Stop(Exception):
    """Ends a forward pass once everything wanted from it has been seen."""


@dataclass(frozen=True)
class Inputs:
    """What the first block sees, and what every block is called with.

    Attributes:
        hidden: [batch, tokens, d].
        calls: one entry per block.
    """

    hidden: Tensor
    calls: list[Call]


class ResidentModel:
    """Blocks of a model that is in memory. The model is changed in place by `put`."""

    def __init__(self, model: PreTrainedModel, plan: Outline | None = None):
        self.model = model.eval()
        self.config: PretrainedConfig = model.config
        self.outline = plan or outline(model.config, type(model))
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    def _block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(f"{self.outline.blocks}.{layer}")

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """The block with its weights in memory."""
        yield self._block(layer)

    @contextlib.contextmanager
    def outside(self, head: bool) -> Iterator[None]:
        """Make the modules around the blocks usable (`head`: the output embedding too)."""
        yield

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """Run `forward(layer, hidden, call)` instead of the blocks' own forward."""

        def replacement(layer: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs.pop("hidden_states")
                result = forward(layer, hidden, (args, kwargs))
                return (result,) if self.outline.returns_tuple else result

            return run

        blocks = [self._block(i) for i in range(self.outline.layers)]
        try:
            for i, block in enumerate(blocks):
                block.forward = replacement(i)  # type: ignore[method-assign]
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _forward(self, ids: Tensor, mask: Tensor | None) -> Any:
        kwargs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if mask is not None:
            kwargs["attention_mask"] = mask.to(self.device).long()
        if self.model.can_generate():
            kwargs["use_cache"] = False
        return self.model(**kwargs)

    def inputs(self, ids: Tensor, mask: Tensor | None = None) -> Inputs:
        """Hidden state before the first block and the arguments of every block, for ids [batch, tokens].

        Call it inside ``with self.outside(head=False)``.
        """
        seen: list[Tensor] = []
        calls: list[Call] = []

        def record(layer: int, hidden: Tensor, call: Call) -> Tensor:
            if layer == 0:
                seen.append(hidden)
            calls.append(call)
            if layer == self.outline.layers - 1:
                raise _Stop
            return hidden

        with self._replaced(record), torch.no_grad(), contextlib.suppress(_Stop):
            self._forward(ids, mask)
        return Inputs(seen[0].detach(), calls)

    def logits(self, ids: Tensor, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] from the last block's output; differentiable in `hidden`.

        Call it inside ``with self.outside(head=True)``.
        """
        last = self.outline.layers - 1
        with self._replaced(lambda layer, h, _call: hidden if layer == last else h):
            return self._forward(ids, mask).logits

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """Output of a block for hidden [batch, tokens, d]."""
        args, kwargs = call
        result = block(hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


class StreamedModel(ResidentModel):
    """Blocks of a checkpoint directory; only the block in use has weights.

    Args:
        path: a directory with config.json and safetensors files (one, or sharded with an index).
        device: where blocks are computed.
        dtype: dtype of the computation; default: float32 on the CPU, the checkpoint's elsewhere.

    Raises:
        NotStreamable: tensor names on disk do not match the model's.
        CorankError: a file is missing, truncated or corrupt.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        self.path = Path(path)
        config = AutoConfig.from_pretrained(self.path)
        self.files = tensor_files(self.path)
        with init_empty_weights(include_buffers=False):
            model = model_class(config)(config)
        model.tie_weights()
        super().__init__(model, outline(config))
        self.device = torch.device(device)
        stored = next(iter(self._meta_dtypes().values()))
        self.stored_dtype = stored
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else stored)
        self.model.to(dtype=self.dtype)  # meta parameters and real buffers alike
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        self._restore_buffer_precision()
        self.keys = self._resolve()

    def _restore_buffer_precision(self) -> None:
        """Buffers are built in float32 (rotary frequencies); a cast to bfloat16 would damage them."""
        if self.dtype == torch.float32:
            return
        with init_empty_weights(include_buffers=False):
            fresh = type(self.model)(self.config)
        for name, buffer in fresh.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _meta_dtypes(self) -> dict[str, torch.dtype]:
        key, file = next(iter(self.files.items()))
        with _open(file) as tensors:
            return {key: tensors.get_tensor(key).dtype}

    def _resolve(self) -> dict[str, str]:
        """Map the model's parameter and buffer names to the names on disk."""
        base = self.model.base_model_prefix
        resolved = {}
        for name in self.model.state_dict():
            for key in (name, name.removeprefix(base + "."), f"{base}.{name}"):
                if key in self.files:
                    resolved[name] = key
                    break
        blocks = self.outline.blocks + "."
        missing = [n for n, _ in self.model.named_parameters() if n.startswith(blocks) and n not in resolved]
        if missing:
            raise NotStreamable(
                f"The checkpoint {self.path} stores {missing[0]} under another name; load it as a whole."
            )
        return resolved

    def read(self, name: str) -> Tensor:
        """One tensor of the checkpoint, by the model's name for it, as stored."""
        key = self.keys[name]
        with _open(self.files[key]) as tensors:
            return tensors.get_tensor(key)

    def _materialise(
        self, module: nn.Module, prefix: str, skip: tuple[nn.Module, ...] = ()
    ) -> list[tuple[nn.Module, str]]:
        filled = []
        by_file: dict[Path, list[tuple[nn.Module, str, str]]] = {}
        for path, child in module.named_modules(prefix=prefix):
            if child in skip:
                continue
            for leaf, parameter in child._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                if parameter is not None and parameter.is_meta and name in self.keys:
                    by_file.setdefault(self.files[self.keys[name]], []).append((child, leaf, self.keys[name]))
            for leaf in child._buffers:
                name = f"{path}.{leaf}" if path else leaf
                if name in self.keys:
                    key = self.keys[name]
                    with _open(self.files[key]) as tensors:
                        child._buffers[leaf] = tensors.get_tensor(key).to(self.device)
        for file, wanted in by_file.items():
            with _open(file) as tensors:
                for child, leaf, key in wanted:
                    value = tensors.get_tensor(key).to(self.device, self.dtype)
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
        block = self._block(layer)
        filled = self._materialise(block, f"{self.outline.blocks}.{layer}")
        try:
            yield block
        finally:
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
            self.model.tie_weights()


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
        raise CorankError(f"{file} is truncated or corrupt ({error}); download or copy it again.") from None


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
