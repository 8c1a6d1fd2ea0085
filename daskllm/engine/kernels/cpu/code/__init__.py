"""What is compiled: functions in Numba's Python, and instructions that they are made of.

Nothing here is imported where `daskllm.engine.kernels.cpu.compiled` finds machine code that was kept, Numba
included. A kernel is a function of one pointer, to its int64 arguments, which never raises.
"""
