"""The machine around the trainer: files (some of them untrusted), the hub, the device and its memory, the console.

Nothing here depends on the rest of the package, which may import all of it.
"""
