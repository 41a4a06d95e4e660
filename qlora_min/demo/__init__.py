"""The embedded demo: a tiny base model inside the package, and the invented world that it knows (world.py).

It imports nothing else from the package.
"""
