"""Text to token ids and back.

In: raw prompts, conversations and their images. Out: ``processor.ProcessedPrompt``, and text from
the ids of an answer. Typed text never becomes a control token in a conversation. Must not import
torch.
"""
