"""The model with transformers' inputs, for training and for comparison.

In: padded ids, masks, pixels and labels. Out: logits and the loss.
Must not import ``llm`` or the runtime.
"""
