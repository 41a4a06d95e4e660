"""Faster computation of the same numbers: a hand-written engine for Llama-shaped models, CUDA graphs for either engine,
and the choice between them. The core never imports this folder: an engine is passed to the loop.
"""
