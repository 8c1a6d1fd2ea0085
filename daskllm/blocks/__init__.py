"""Weights in memory: arrays on CPU or GPU, the process's store of them, and loading them from a checkpoint.

This room knows tensors by model, version, layer and name. It refuses to know what a layer computes and how
a model is planned.
"""
