"""Several processes that make one run, and a base of which each holds a part.

With one process none of this does anything. The core never imports it: the processes are handed to the loop.
"""
