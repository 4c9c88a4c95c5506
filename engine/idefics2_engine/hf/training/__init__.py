"""Training transformers' class: the loss without logits, checkpoints that keep attention, checks.

In: what transformers' ``forward`` and ``Trainer`` pass. Out: a loss, and gradients by the kernels.
``loss`` has the class and ``kept_attention`` what its checkpoints keep. ``finite_gradients`` stops a
run whose gradients are not finite.
"""
