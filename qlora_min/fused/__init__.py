"""The same numbers faster: a second engine, written by hand for Llama-shaped models, CUDA graphs for either engine, and
the choice between them. The core never imports it: an engine is handed to the loop.
"""
