"""The engine on a cluster: one session per process, tasks over partitions, progress, where rows run.

dask and distributed appear here and above only. This room knows neither columns' meaning to a user (`frame`)
nor how a token is made (`engine`). Nothing here imports torch until a session is opened: schedulers and
clients unpickle these modules too.
"""
