"""Kernels for a CPU. `operations` has the list of them; `code` is what is compiled, and the rest calls it.

Nothing is imported here: `ahead` and what it calls run while torch is being imported.
"""
