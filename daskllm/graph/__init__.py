"""Planning in plain Python: the layer graph, its costs, how it is cut, placed and scheduled, the plan.

This room needs no array library and knows neither Dask nor weights: a config (or a file, or a few lines by
hand) makes a graph, measured or given devices make a cluster, and the two make a `Plan` that others execute.
"""

from daskllm.graph.cluster import Cluster, Device, Link, Workload
from daskllm.graph.cost import CostModel, Loads, MemoryUse, Objective
from daskllm.graph.errors import PlanError
from daskllm.graph.files import GraphFile, read_graph
from daskllm.graph.layers import LayerGraph
from daskllm.graph.nodes import Edge, Node, Opening, Step, elementwise, linear
from daskllm.graph.place import SCHEDULERS, place, schedule
from daskllm.graph.plan import Measured, Plan, Replica, Stage
from daskllm.graph.planner import make_plan
from daskllm.graph.schedule import Machine, Problem, Schedule, Task
from daskllm.graph.simulate import Simulated, simulate_batch, simulate_loop
from daskllm.graph.split import SPLITTERS, Split, lower_bound, split

__all__ = [
    "SCHEDULERS",
    "SPLITTERS",
    "Cluster",
    "CostModel",
    "Device",
    "Edge",
    "GraphFile",
    "LayerGraph",
    "Link",
    "Loads",
    "Machine",
    "Measured",
    "MemoryUse",
    "Node",
    "Objective",
    "Opening",
    "Plan",
    "PlanError",
    "Problem",
    "Replica",
    "Schedule",
    "Simulated",
    "Split",
    "Stage",
    "Step",
    "Task",
    "Workload",
    "elementwise",
    "linear",
    "lower_bound",
    "make_plan",
    "place",
    "read_graph",
    "schedule",
    "simulate_batch",
    "simulate_loop",
    "split",
]
