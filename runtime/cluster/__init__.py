"""A whole cluster of real processes on this machine: its launcher, its ranks, and the faults staged on it.

Every rank is a process of its own and runs the scheduler of ``statemachine.ranks``, the one that the simulator runs.
"""
