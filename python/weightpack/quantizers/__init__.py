"""Quantizers: what wires a backend library into a model, one module per backend.

`config` and `base` hold the two base classes, `auto` the registry, `modules` the one walker that
swaps layers. Nothing here imports torch or a backend before it is used. How the hooks follow each
other is told in `base`.
"""
