"""Requests to answers on one device: the step loop, its thread, and what a forward pass needs.

In: ``scheduling.sequence.Request``. Out: its tokens, a step at a time.
Must not import ``llm``, and of ``prompts`` it imports the tokenizer and the detokenizer alone.
"""
