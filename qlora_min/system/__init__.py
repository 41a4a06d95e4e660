"""The machine around the trainer: files on its disk (some of them hostile), the hub, its memory, its console.

Nothing here knows of models or training; everything else may use it.
"""
