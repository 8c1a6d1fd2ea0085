"""Long runs: what one would take, how far it is, and what it leaves behind.

It refuses to know how rows are answered, and what a user's table or command looks like.
"""

from daskllm.jobs.eta import Eta, State
from daskllm.jobs.explain import explain
from daskllm.jobs.explanation import Explanation
from daskllm.jobs.watch import progress_bar, watching

__all__ = ["Eta", "Explanation", "State", "explain", "progress_bar", "watching"]
