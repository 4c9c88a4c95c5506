"""Adapters for evaluation harnesses, and what they share.

``lmms_eval_model`` needs lmms-eval and ``lm_eval_model`` lm-evaluation-harness. Nothing else imports
these two.
"""
