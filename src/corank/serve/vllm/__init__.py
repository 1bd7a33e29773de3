"""Factorized linear layers in vLLM.

| file | what is in it |
|---|---|
| `specs` | what config.json says, and how vLLM's names lead to it |
| `slicing` | which rows and columns of a stored matrix one tensor-parallel rank holds |
| `weights` | the parameters of a layer, and the loader that fills them |
| `compute` | y = W' x from what was loaded |
| `config` | the two classes vLLM sees; the only file that imports vLLM |
"""
