"""The commands, with their tables, scores and HTML report, the benchmarks, and pushing to the hub.

`qlora-min COMMAND` and `scripts/COMMAND.py` do the same.
"""
