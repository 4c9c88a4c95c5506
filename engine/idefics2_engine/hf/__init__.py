"""The model with the inputs of transformers, for training and comparison.

In: padded ids, masks, pixels and labels. Out: logits and the loss.
Must not import ``llm`` or the runtime.
"""
