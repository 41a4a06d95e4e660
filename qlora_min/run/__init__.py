"""A run around the loop: its data and options, its directory (checkpoints, metrics, the best adapter, a card, curves),
what happens at a signal or a disk's failure, resuming, the plan that is printed before, and the ending.
"""
