"""Ways to run a model of factors: the same numbers with less memory, fewer launches, or kernels of our own.

    from corank.runtime import set_runtime

    model, tokenizer = corank.load("small")
    set_runtime(model, "auto")     # in place; set_runtime(model, "torch") restores the model exactly

| runtime | what it does |
|---|---|
| `torch` | the modules as they are |
| `chunked` | MLPs over chunks of tokens: [tokens, intermediate] never exists |
| `flashsvd` | chunked, and attention from latents by groups of heads |
| `packed` | chunked, one product for the first factors of matrices that read one input, tall factors by columns |
| `triton` | packed, with the operations of `corank.kernels` where they suit |
| `graph` | packed, and generation with a static cache, every step one compiled graph |
| `auto` | per layer and number of tokens the fastest of these as measured on this device, never slower than `torch` |

A runtime replaces methods of modules, not modules: names, parameters, hooks and the state dict stay what they are. It
works on whatever weights the model has at the moment of a call, after loading, moving, casting or merging adapters.
Where it cannot help (gradients, autocast, a compiler, hooks on the inner matrices, unknown structures) the module runs
as it is; the logger `corank.runtime` says so once, at level DEBUG.

Packing moves the storage of parameters. Choose the runtime before recording a CUDA graph of your own, also where a
second model shares the parameters.

`absorb` moves the permutations of pivoted layers into their neighbours, once and for all.
"""

from corank.runtime.absorb import absorb
from corank.runtime.dispatch import Table
from corank.runtime.override import overrides, uninstall
from corank.runtime.peak import peak_activation
from corank.runtime.tiers import TIERS, runtime_of, set_runtime

__all__ = ["TIERS", "Table", "absorb", "overrides", "peak_activation", "runtime_of", "set_runtime", "uninstall"]
