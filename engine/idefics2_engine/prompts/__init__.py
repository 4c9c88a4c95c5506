"""Conversion of prompts and conversations to token ids, and of token ids to text.

In: raw prompts, conversations and their images. Out: ``processor.ProcessedPrompt``, and the text of
answers. In a conversation, typed text never becomes a control token. Must not import torch.
"""
