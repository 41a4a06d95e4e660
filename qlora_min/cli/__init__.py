"""The commands, and what they show: tables, scores, the HTML report, benchmarks, pushing to the hub.

`qlora-min COMMAND` and `scripts/COMMAND.py` are the same.
"""
