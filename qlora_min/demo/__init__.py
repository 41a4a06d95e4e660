"""The embedded demo: a tiny base that the package carries, and the invented world that it knows (world.py).

It imports nothing else of the package.
"""
