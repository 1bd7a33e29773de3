"""corank compresses neural networks by factorizing what they are made of.

    import corank

    report = corank.compress("smollm2-135m", keep=0.8, out="small")
    model, tokenizer = corank.load("small")

Importing corank registers its checkpoint format with transformers, so that ``AutoModelForCausalLM.from_pretrained``
loads a compressed directory like any other.
"""

from corank.quiet import quiet_imports

with quiet_imports():
    import corank.evaluate
    import corank.heal
    import corank.methods  # noqa: F401  these are packages whose names the functions below take over
    from corank.account import VERSION as __version__
    from corank.api import compress, evaluate, load
    from corank.budget import Budget
    from corank.checkpoint import dequantize, verify
    from corank.errors import CorankError
    from corank.healing import heal
    from corank.pruning import prune
    from corank.recipe import Recipe, methods, register
    from corank.report import Report

__all__ = [
    "Budget",
    "CorankError",
    "Recipe",
    "Report",
    "__version__",
    "compress",
    "dequantize",
    "evaluate",
    "heal",
    "load",
    "methods",
    "prune",
    "register",
    "verify",
]
