"""The engine on one device: the step loop, its thread, and the inputs of a forward pass.

In: ``scheduling.sequence.Request``. Out: its tokens, step by step.
Must not import ``llm``. Of the prompts' modules it uses the tokenizer and detokenizer alone.
"""
