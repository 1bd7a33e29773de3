"""Whether a processor has instructions for products of 16-bit numbers; without them such products are slower than in float32."""

from __future__ import annotations

import torch

#: dtype -> names in `torch.cpu.get_capabilities()`, those of x86 and then those of ARM
INSTRUCTIONS: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "avx10_2", "fp16_arith"),
}


def instructions(dtype: torch.dtype) -> tuple[str, ...] | None:
    """The instructions that this processor has for products in a dtype; None where that is not known or makes no difference."""
    if dtype not in INSTRUCTIONS or not hasattr(torch.cpu, "get_capabilities"):
        return None
    has = torch.cpu.get_capabilities()
    return tuple(name for name in INSTRUCTIONS[dtype] if has.get(name))


def drawback(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """What to tell who times a model of this dtype here; None where there is nothing to tell."""
    if torch.device(device).type != "cpu" or instructions(dtype) != ():
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"This processor has no instructions for {name}: such weights take half the memory of float32, and their products are "
        "slower; time with --dtype float32 to see what low rank gains."
    )
