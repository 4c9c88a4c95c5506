"""Sampling of tokens and log probabilities, with parameters and a random stream per sequence.

In: the logits of a step. Out: ``sampler.Drawn``, which the host reads later.
Must not import the runtime.
"""
