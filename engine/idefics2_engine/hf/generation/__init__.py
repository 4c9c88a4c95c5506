"""``generate`` of transformers' class on the engine.

In: what transformers has prepared for its own loop: ids, masks, pixels, processors and criteria.
Out: the same tokens. ``obstacles`` says what the engine has not, ``sampling`` and ``requests``
translate, and ``model_engine`` has the engine on the model's own memory.
"""
