"""Run lm-evaluation-harness with the model ``idefics2_engine``, which importing this registers.

    python examples/lm_eval_idefics2.py run --model idefics2_engine --tasks mmmu_val
        --model_args pretrained=HuggingFaceM4/idefics2-8b --apply_chat_template

The arguments are those of ``lm-eval``. ``--model_args`` has arguments of ``LLM`` besides
``pretrained``. Without ``pretrained`` the demo checkpoint answers.
"""

from lm_eval.__main__ import cli_evaluate

from idefics2_engine.evaluation import lm_eval_model

__all__ = ["lm_eval_model"]

if __name__ == "__main__":
    cli_evaluate()
