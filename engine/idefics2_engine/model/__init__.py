"""The network: vision tower, connector and text model, and its config.

In: batches of packed patches and tokens, and an ``Ops`` to compute with. Out: image features and
logits.
Each layer is written once, against ``idefics2_kernels.Ops``.
Must not import the checkpoint, the prompts or the runtime.
"""
