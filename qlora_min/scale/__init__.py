"""One training run on several processes, and a base sharded across them.

With a single process nothing here has any effect. The core never imports this folder: the processes are passed to it.
"""
