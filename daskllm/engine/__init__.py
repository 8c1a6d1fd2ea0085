"""The engine: token ids in, token ids out, in one process.

`batcher` decides what runs next, `kvcache` keeps keys and values in blocks, `runner` does the layers over a
ragged `batch`, `sampler` picks tokens, `engine` turns the crank for any number of callers, and `kernels`
holds the operations. Nothing here knows Dask, text or tables.
"""
