"""From raw rows to rows of a job.

In: what a ``Source`` yields, in one of two forms: ``columns_form`` and ``openai_form``. Out:
``JobRow``, with its key, or the error of a bad row.
"""
