"""Saving adapters so that PEFT loads them, and loading them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corank.adapters.attaching import require_peft
from corank.errors import CorankError

if TYPE_CHECKING:
    from peft import PeftModel


def save(model: PeftModel, directory: str | os.PathLike[str], name: str = "default") -> Path:
    """Write an adapter such that ``PeftModel.from_pretrained(model, directory)`` loads it.

    An adapter that started as a part of the weights (pissa, corda) is converted to an ordinary LoRA of twice the rank,
    which belongs to the weights as they were before `attach`, and needs no corank. All others are written as
    `save_pretrained` does.

    Args:
        model: what `attach` returned.
        directory: new, or empty.
        name: of the adapter.

    Returns:
        the directory.

    Raises:
        CorankError: it is not a PEFT model, has no such adapter, or the directory is not empty. Nothing is written then.
    """
    from corank.adapters.starting import has_start, plain_lora
    from corank.checkpoint.saving import publish

    peft = require_peft()
    if not isinstance(model, peft.PeftModel):
        raise CorankError("This model has no adapters to save; give what attach returned.")
    if name not in model.peft_config:
        raise CorankError(f"The model has no adapter {name!r}; it has {', '.join(model.peft_config)}.")
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CorankError(f"{target} is not an empty directory; give a new one, or delete it first.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if has_start(model, name):
            from safetensors.torch import save_file

            config, state = plain_lora(model, name)
            config.inference_mode = True
            partial.mkdir(parents=True)
            tensors = {key: value.contiguous().cpu() for key, value in state.items()}
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(partial))
            return publish(partial, target)
        model.save_pretrained(str(partial), selected_adapters=[name])
        inner = partial / name if name != "default" else partial
        return publish(inner, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(model: Any, directory: str | os.PathLike[str], *, trainable: bool = False, name: str = "default") -> PeftModel:
    """Put a saved adapter on the model it was made for; ``PeftModel.from_pretrained`` with errors that say more.

    Args:
        model: as it was before `attach`.
        directory: what `save` or `save_pretrained` wrote.
        trainable: go on training it.
        name: to give the adapter.

    Raises:
        CorankError: peft is not installed, no adapter in the directory, or one that does not fit the model.
    """
    peft = require_peft()
    if not (Path(directory) / "adapter_config.json").is_file():
        raise CorankError(f"{directory} holds no adapter: it has no adapter_config.json.")
    try:
        return peft.PeftModel.from_pretrained(model, str(directory), adapter_name=name, is_trainable=trainable)
    except CorankError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CorankError(f"The adapter in {directory} does not fit this model: {reason[:300]}") from error
