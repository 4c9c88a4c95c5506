"""The gradients of the operations, for training.

Every sum has a fixed order, so two runs give the same bits.
"""
