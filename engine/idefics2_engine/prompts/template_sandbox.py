"""A sandboxed Jinja environment for chat templates, with bounds on time and memory.

Jinja's sandbox protects Python's internals, but does not stop ``'a' * 10**9`` or nested loops. Here
every operation of a template first checks the clock, and an operation whose result could exceed a
size limit does not start. The work between two checks is therefore bounded, in any thread and
without signals. Jinja has hooks for calls, operators, items and output. Operations without a hook
(``~``, comparisons, slices, literals, loops) are rewritten at compile time to filters whose names
no template can spell.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from idefics2_engine.prompts.template_budget import (
    FILTERS,
    MAX_BITS,
    METHODS,
    Budget,
    Estimate,
    TemplateLimitError,
    current,
    formatted,
    is_number,
    no_size,
    product_of_sizes,
    sum_of_sizes,
)
from idefics2_engine.prompts.text_slots import (
    LONGEST_TEXT,
    Slot,
    SlotPiece,
    SlottedText,
    WrittenSlot,
    refuse_slots,
)

# Templates on the hub have up to about 30,000 characters
MAX_SOURCE = 2**16
# Compiling one node of the syntax tree takes about 50 us
_MAX_NODES = 2**14
# Some codecs and methods of Markup take quadratic time. So does comparing many keys with equal
# hashes
_UNSAFE_METHODS = {"encode", "to_bytes", "striptags", "unescape", "fromkeys", "isdisjoint"}


class _Namespace(Namespace):
    """Jinja's namespace with a constant ``repr`` and without private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = _make_dict(*args, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace must have public names, got {name!s:.40}")


class _Generation(Extension):
    """The tag ``{% generation %}``, which marks the assistant's words for training: ignored."""

    tags = {"generation"}  # noqa: RUF012  as declared by the base

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the content of the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@dataclass
class _Items:
    """The items of a loop, with a check of the clock for each."""

    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        look = current.get().look
        for item in self.items:
            look()
            yield item


def _watched_items(value: Any) -> _Items:
    # An error about a value that is not iterable must be raised where the loop begins
    iter(value)
    return _Items(value)


def _bounded_value(value: Any) -> Any:
    budget = current.get()
    budget.allow(budget.size(value))
    return value


def _written_value(value: Any) -> Any:
    value = _bounded_value(value)
    return WrittenSlot(value) if type(value) is Slot else value


def _bounded_text(values: tuple[Any, ...]) -> str:
    budget = current.get()
    budget.allow(sum_of_sizes(budget, list(values)))
    return "".join(map(str, values))


_WATCHED, _BOUNDED, _JOINED = "watched items", "bounded value", "bounded text"


class _Rewrite(NodeTransformer):
    """Wraps operations without a hook in Jinja's sandbox in a filter."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Return ``node`` rewritten, after its children."""
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.iter = _filter(node.iter, _WATCHED)
            case nodes.Concat():
                return _filter(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _JOINED)
            case (
                nodes.Compare()
                | nodes.List()
                | nodes.Dict()
                | nodes.Tuple(ctx="load")
                | nodes.Getitem(arg=nodes.Slice())
            ):
                return _filter(node, _BOUNDED)
        return node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment like transformers', with bounds on compiling and rendering."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_written_value,
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = _Namespace
        # A template could call methods of the type dict, so it gets a function
        self.globals["dict"] = _make_dict
        del self.globals["lipsum"]
        self.filters["tojson"] = self._to_json
        self.filters = {
            name: _bound_filter(self.filters[name], estimate) for name, estimate in FILTERS.items()
        }
        self.filters |= {
            _WATCHED: _watched_items,
            _BOUNDED: _bounded_value,
            _JOINED: _bounded_text,
        }
        self.tests = {name: _watch_test(test) for name, test in self.tests.items()}

    def compile_template(self, source: str) -> jinja2.Template:
        """Compile ``source`` without running any part of it, not even constant expressions.

        Raises:
            jinja2.TemplateError: ``source`` is too long or not a template.
        """
        if len(source) > MAX_SOURCE:
            raise jinja2.TemplateSyntaxError(f"must have at most {MAX_SOURCE} characters", 1)
        tree = self.parse(source)
        if sum(1 for _ in tree.find_all(nodes.Node)) > _MAX_NODES:
            raise jinja2.TemplateSyntaxError(f"must have at most {_MAX_NODES} nodes", 1)
        return self.from_string(_Rewrite().visit(tree))

    @contextmanager
    def bounds(self, input_size: int) -> Iterator[None]:
        """Set the budget of rendering ``input_size`` characters; rendering requires it."""
        token = current.set(Budget.for_input(input_size))
        try:
            yield
        finally:
            current.reset(token)

    def render_slots(self, template: jinja2.Template, variables: dict[str, Any]) -> SlottedText:
        """Return what ``template`` writes for ``variables`` in which texts are slots.

        Raises:
            Exception: As in rendering. The template looks at a text, or it would be refused if
                texts were long.
        """
        with self.bounds(0):
            budget = current.get()
            kept, total = [], 0
            for piece in template.root_render_func(template.new_context(variables)):
                size = LONGEST_TEXT if type(piece) is SlotPiece else len(piece)
                budget.allow(size)
                total += size
                kept.append(piece)
            budget.allow(total)
        return SlottedText(kept)

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the output, at the end and for each macro and block."""
        budget = current.get()
        kept = []
        for piece in pieces:
            budget.allow(len(piece))
            kept.append(piece)
        # The template could look at the joined text
        refuse_slots(kept)
        budget.allow(sum(map(len, kept)))
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``."""
        budget = current.get()
        if is_number(left) and is_number(right):
            budget.look()
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length(), right.bit_length()
                power = bits[0] * right if operator == "**" else 0
                if max(sum(bits), power) > MAX_BITS:
                    raise TemplateLimitError(f"integers must have at most {MAX_BITS} bits")
        elif isinstance(left, Set) or isinstance(right, Set):
            raise SecurityError("the views of a dict are no operands")
        elif operator == "%":
            budget.allow(formatted(budget, [left, right]) if isinstance(left, str) else 0)
        else:
            budget.allow(
                (product_of_sizes if operator == "*" else sum_of_sizes)(budget, [left, right])
            )
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may access ``obj.attr``."""
        return attr not in _UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return ``obj[argument]``."""
        refuse_slots((obj, argument))
        current.get().look()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a macro, a method or a function."""
        budget = current.get()
        budget.look()
        refuse_slots((__obj, *args, *kwargs.values()))
        # The sandbox wraps str.format
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        # Methods of Markup, a subclass of str, are not built in
        if isinstance(method, BuiltinMethodType) or isinstance(owner, str):
            estimate = METHODS.get(method.__name__, product_of_sizes)
            budget.allow(estimate(budget, [owner, *args, *kwargs.values()]))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.allow(budget.size(result))
        return result

    def _to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Write JSON without HTML escapes, as templates on the hub expect."""
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None:
            return encoder.encode(value)
        # The indent of deep values is not part of the estimate, so each piece is counted
        return self.concat(encoder.iterencode(value))


def _bound_filter(function: Callable[..., Any], estimate: Estimate) -> Callable[..., Any]:
    # Some filters get the context or the environment before the operands
    skipped = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        refuse_slots((*args, *kwargs.values()))
        budget.allow(estimate(budget, [*args[skipped:], *kwargs.values()]))
        result = budget.materialize(function(*args, **kwargs))
        if estimate is not no_size:
            budget.allow(budget.size(result))
        return result

    return bounded


def _watch_test(function: Any) -> Any:
    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        refuse_slots((*args, *kwargs.values()))
        current.get().look()
        return function(*args, **kwargs)

    return watched


def _make_dict(source: Any = (), /, **kwargs: Any) -> dict[Any, Any]:
    """Build a dict item by item, because keys with equal hashes take quadratic time."""
    look = current.get().look
    made = {}
    for key, value in source.items() if isinstance(source, Mapping) else source:
        look()
        made[key] = value
    return made | kwargs


def _raise_exception(message: str) -> NoReturn:
    """Raise an error of the template; templates on the hub call this ``raise_exception``."""
    raise jinja2.TemplateError(f"{message!s:.500}")
