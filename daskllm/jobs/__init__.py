"""Long runs: what one would take, how far it is, and what it leaves behind, so that the same call goes on.

It owns the directory of a job: its parts, each whole or not there, and the manifest beside them. It refuses
to know how rows are answered, and what a user's table or command looks like.
"""

from daskllm.jobs.background import BackgroundJob, find, names, queue, submit
from daskllm.jobs.directory import Directory
from daskllm.jobs.eta import Eta, State
from daskllm.jobs.explain import explain
from daskllm.jobs.explanation import Explanation
from daskllm.jobs.formats import FileKind
from daskllm.jobs.identity import Input, stat_input
from daskllm.jobs.job import Job, prepare
from daskllm.jobs.limits import Limit, OnError
from daskllm.jobs.look import look
from daskllm.jobs.manifest import Manifest, Part
from daskllm.jobs.run import Summary, run
from daskllm.jobs.watch import progress_bar, watching

__all__ = [
    "BackgroundJob",
    "Directory",
    "Eta",
    "Explanation",
    "FileKind",
    "Input",
    "Job",
    "Limit",
    "Manifest",
    "OnError",
    "Part",
    "State",
    "Summary",
    "explain",
    "find",
    "look",
    "names",
    "prepare",
    "progress_bar",
    "queue",
    "run",
    "stat_input",
    "submit",
    "watching",
]
