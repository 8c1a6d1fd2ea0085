"""``df.llm``: a table in, a table out, for pandas and Dask.

It owns the accessor's calls, what they check before any work, and the expression that Dask optimises. It
takes any object with a ``spec`` (`Handle`) and refuses to know how a model is loaded or run.
"""

from daskllm.frame.accessor import DaskAccessor, PandasAccessor
from daskllm.frame.ask import Handle, ask_series, call_over, check_chats

__all__ = ["DaskAccessor", "Handle", "PandasAccessor", "ask_series", "call_over", "check_chats"]
