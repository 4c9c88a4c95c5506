"""Triton's interpreter without work that it repeats for nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def make_quick() -> None:
    """Leave out three things that take more than half of the time of a kernel in the interpreter.

    - At each call of a jitted helper it replaces the names of ``triton.language`` again, although
      the launch has replaced them.
    - For each sum and product of integers it computes whether they overflow, and drops the result,
      because its options have no ``debug``.
    - At each look-up of a type it builds the table of all types.
    """
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_a_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _once_a_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``patch_lang`` that does nothing for a module until the launch restores the names."""
    patched: set[int] = set()

    def patch(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        # The kernel comes before its helpers, and its launch alone restores names
        if not patched:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        patched.add(module)
        return scope

    return patch


def _once_a_name(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def find(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = np_dtype(dtype)
        return found[dtype.name]

    return find
