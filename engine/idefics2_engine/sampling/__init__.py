"""Logits to tokens and log probabilities, each sequence by its own parameters and random stream.

In: the logits of a step. Out: ``sampler.Drawn``, which is read when the device is done.
Must not import the runtime.
"""
