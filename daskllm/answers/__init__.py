"""Finished rows, kept by their content outside the process that generated them.

A lost worker's rows are not generated again, and rows that were answered once cost nothing the next time.
`store` is the door, `segment` the format of its files, `index` what a process remembers of them, `place`
where they lie. This room knows no Dask, no model and no table: a row is a key here, and its answers are
completions.
"""

from daskllm.answers.place import Place
from daskllm.answers.store import FLUSH_SECONDS, LIMIT, Answers, key_of, space_of

__all__ = ["FLUSH_SECONDS", "LIMIT", "Answers", "Place", "key_of", "space_of"]
