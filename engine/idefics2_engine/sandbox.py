"""A Jinja environment for chat templates: no way out, and bounds on time and memory.

Jinja's sandbox keeps a template from Python's internals, not from ``'a' * 10**9`` or from loops in loops. Here every
operation that a template is made of first looks at the clock, and none begins whose result could pass a size limit.
So what lies between two looks is bounded, in any thread and without a signal. The hooks are Jinja's own for calls,
operators, items and output; what has none (``~``, comparisons, slices, literals, loops) is rewritten, when the
template is compiled, into filters whose names no template can spell.
"""

import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from string import Formatter
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 0.5  # of one rendering; a conversation takes less than a thousandth
MAX_SOURCE = 2**16  # characters of a template; the hub's have up to some 30,000
_MAX_NODES = 2**14  # of its syntax tree, each of which takes some 50 us to compile
_BASE_SIZE = 2**20  # characters that any value may have
_SIZE_FACTOR = 16  # and more for each character of the conversation
_TOTAL_FACTOR = 32  # and as many times this for all values of a rendering together
_MAX_BITS = 2**15  # of an integer
_MAX_DEPTH = 1000  # of nested values: Python's own limit of recursion
_SLOT = 8  # what an element of a container counts beside its own size: memory, and time to visit


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template takes more time or memory than it may."""


@dataclass
class _Budget:
    """What one rendering may still take."""

    max_size: int
    total: float = 0
    cpu: float = field(default_factory=time.thread_time)
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def look(self) -> None:
        """Raise once the time is over, and the thread has really worked that long."""
        if time.monotonic() > self.deadline and time.thread_time() - self.cpu > SECONDS:
            raise TemplateLimitError(f"must take at most {SECONDS} s")

    def allow(self, size: float) -> None:
        """Raise if the time is over or a value of ``size`` too much; all are counted, as if none went away."""
        self.look()
        if size > self.max_size:
            raise TemplateLimitError(f"a value must have a size of at most {self.max_size}")
        self.total += size
        if self.total > _TOTAL_FACTOR * self.max_size:
            raise TemplateLimitError(
                f"values must have a size of at most {_TOTAL_FACTOR * self.max_size} together"
            )

    def size(self, value: Any) -> int:
        """Return the characters of ``value``, a shared part counted each time; stop above the limit."""
        total = 0
        rest: list[Any] = [value]
        while rest and total <= self.max_size:
            value = rest.pop()
            if isinstance(value, str):
                total += len(value)
            elif isinstance(value, int):
                total += value.bit_length() // 8
            elif isinstance(value, Mapping):
                total += 2 * _SLOT * len(value)
                rest += value.keys()
                rest += value.values()
            elif isinstance(value, range):
                total += _SLOT * len(value)
            elif isinstance(value, _Settled):
                total += value.size
            elif isinstance(value, _CONTAINERS):
                total += _SLOT * len(value)
                rest += value
        return total

    def settle(self, value: object) -> object:
        """Return ``value``, or if it is lazy an iterator over what it yields, now that its size is known."""
        if not isinstance(value, Iterator) or isinstance(value, _Settled | LoopContext):
            return value
        total = 0
        items = []
        for item in value:
            size = _SLOT + self.size(item)
            self.allow(size)
            total += size
            items.append(item)
        self.allow(total)
        return _Settled(iter(items), total)


@dataclass
class _Settled:
    """An iterator of known size: like the lazy one it replaces it is true, has no length and ends."""

    items: Iterator[Any]
    size: int

    def __iter__(self) -> Iterator[Any]:
        return self.items

    def __next__(self) -> Any:
        return next(self.items)


_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    set,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)
_budget: ContextVar[_Budget] = ContextVar("budget of the rendering")

# An estimate bounds the size of a result from the operands, in whatever order keywords bring them. Of what is in no
# table below it is the product of lengths and numbers, which bounds all that repeats or pads.
_Estimate = Callable[[_Budget, list[Any]], float]


def _sum(budget: _Budget, values: list[Any]) -> float:
    return sum(budget.size(value) for value in values)


def _extent(budget: _Budget, value: Any) -> float:
    return abs(value) if _is_number(value) else budget.size(value)


def _padded(budget: _Budget, values: list[Any]) -> float:
    return sum(_extent(budget, value) for value in values)


def _product(budget: _Budget, values: list[Any]) -> float:
    return math.prod(1 + _extent(budget, value) for value in values)


def _nothing(budget: _Budget, values: list[Any]) -> float:
    return 0


def _replaced(budget: _Budget, values: list[Any]) -> float:
    text, *rest = values
    words = [value for value in rest if isinstance(value, str)]
    if not isinstance(text, str) or len(words) < 2:
        return _product(budget, values)
    return len(text) + max(text.count(word) for word in words) * sum(map(len, words))


def _formatted(budget: _Budget, values: list[Any]) -> float:
    """Bound ``text % values``, widths included."""
    text, *rest = str(values[0]), *values[1:]
    width = _largest_number(text)
    if "*" in text:  # a width among the values
        width += _product(budget, [number for value in rest for number in _numbers(value)])
    return len(text) + text.count("%") * (width + _sum(budget, rest))


def _braced(budget: _Budget, values: list[Any]) -> float:
    """Bound ``text.format(*values)``, widths included, but for one that comes from a value."""
    text, *rest = str(values[0]), *values[1:]
    try:
        nested = any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(text))
    except ValueError:  # which format raises itself
        return 0
    fields = text.count("{") * (_largest_number(text) + _sum(budget, rest))
    return math.inf if nested else len(text) + fields


def _largest_number(text: str) -> float:
    digits: int = max((len(number) for number in re.findall(r"\d+", text)), default=0)
    return float(10 ** min(digits, 18))


def _encoded(budget: _Budget, values: list[Any]) -> float:
    """Bound ``tojson`` but for the indent of deep values, which is written piece by piece."""
    value, *options = values
    indent = max((_extent(budget, option) for option in options), default=0)
    return budget.size(value) * (1 + _sum(budget, options) / _SLOT) + _MAX_DEPTH * indent


def _summed(budget: _Budget, values: list[Any]) -> float:
    """Bound ``sum``, which takes quadratic time unless it starts with a number."""
    return math.inf if any(isinstance(value, _CONTAINERS) for value in values[1:]) else 0


def _numbers(value: object) -> list[Any]:
    items = value.values() if isinstance(value, Mapping) else value
    return [
        item for item in (items if isinstance(items, Iterable) else [items]) if _is_number(item)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(**names: tuple[_Estimate, str]) -> dict[str, _Estimate]:
    return {name: estimate for estimate, listed in names.values() for name in listed.split()}


_METHODS = _table(
    linear=(
        _sum,
        "count endswith find get index partition removeprefix removesuffix split startswith",
    ),
    padded=(_padded, "center ljust rjust zfill"),
    braced=(_braced, "format format_map"),
    replaced=(_replaced, "replace"),
)
# What makes bytes, for some codecs take quadratic time, as do Markup's own; and what compares many keys at once, which
# may all have the same hash
_UNSAFE_METHODS = {
    *("encode", "to_bytes", "striptags", "unescape"),
    *("fromkeys", "isdisjoint"),
}
_FILTERS = _table(
    free=(_nothing, "abs attr count d default first last length max min random safe"),
    linear=(
        _sum,
        "capitalize dictsort e escape filesizeformat float forceescape groupby int items list "
        "lower map reject rejectattr reverse select selectattr sort string title truncate unique "
        "upper urlencode wordcount",
    ),
    multiplied=(_product, "batch indent join round slice trim"),
    padded=(_padded, "center"),
    formatted=(_formatted, "format"),
    replaced=(_replaced, "replace"),
    encoded=(_encoded, "tojson"),
    summed=(_summed, "sum"),
)
"""The filters there are; Jinja's others are for web pages, and some of them take quadratic time."""


class _Namespace(Namespace):
    """Jinja's, without a ``repr`` that writes out what it holds, and without private names."""

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
    """``{% generation %}``, which marks the assistant's words for training; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012  as declared by the base

    def parse(self, parser: Parser) -> nodes.Node:
        """Return what the tag encloses."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@dataclass
class _Items:
    """What a loop goes through, with a look at the clock for each item."""

    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        look = _budget.get().look
        for item in self.items:
            look()
            yield item


def _watched_items(value: Any) -> _Items:
    iter(value)  # raises, if it must, where the loop begins
    return _Items(value)


def _bounded_value(value: Any) -> Any:
    budget = _budget.get()
    budget.allow(budget.size(value))
    return value


def _bounded_text(values: tuple[Any, ...]) -> str:
    budget = _budget.get()
    budget.allow(_sum(budget, list(values)))
    return "".join(map(str, values))


_WATCHED, _BOUNDED, _JOINED = "watched items", "bounded value", "bounded text"


class _Rewrite(NodeTransformer):
    """Puts a filter of ours around what Jinja's sandbox has no hook for."""

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
    """Compiles templates and renders them within the bounds, as transformers' environment does otherwise."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_bounded_value,
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = _Namespace
        self.globals["dict"] = _make_dict  # no type, whose methods a template could call
        del self.globals["lipsum"]
        self.filters["tojson"] = self._to_json
        self.filters = {
            name: _bound_filter(self.filters[name], estimate) for name, estimate in _FILTERS.items()
        }
        self.filters |= {
            _WATCHED: _watched_items,
            _BOUNDED: _bounded_value,
            _JOINED: _bounded_text,
        }
        self.tests = {name: _watch_test(test) for name, test in self.tests.items()}

    def compile_template(self, source: str) -> jinja2.Template:
        """Compile ``source``; nothing of it runs, not even what is constant.

        Raises:
            jinja2.TemplateError: ``source`` is too long or no template.
        """
        if len(source) > MAX_SOURCE:
            raise jinja2.TemplateSyntaxError(f"must have at most {MAX_SOURCE} characters", 1)
        tree = self.parse(source)
        if sum(1 for _ in tree.find_all(nodes.Node)) > _MAX_NODES:
            raise jinja2.TemplateSyntaxError(f"must have at most {_MAX_NODES} nodes", 1)
        return self.from_string(_Rewrite().visit(tree))

    @contextmanager
    def bounds(self, input_size: int) -> Iterator[None]:
        """Start the clock for one rendering of ``input_size`` characters; nothing runs without it."""
        token = _budget.set(_Budget(_BASE_SIZE + _SIZE_FACTOR * input_size))
        try:
            yield
        finally:
            _budget.reset(token)

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what was written, which Jinja does at the end and for each macro and block."""
        budget = _budget.get()
        kept = []
        for piece in pieces:
            budget.allow(len(piece))
            kept.append(piece)
        budget.allow(sum(map(len, kept)))
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``."""
        budget = _budget.get()
        if _is_number(left) and _is_number(right):
            budget.look()
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length(), right.bit_length()
                power = bits[0] * right if operator == "**" else 0
                if max(sum(bits), power) > _MAX_BITS:
                    raise TemplateLimitError(f"integers must have at most {_MAX_BITS} bits")
        elif isinstance(left, Set) or isinstance(right, Set):
            raise SecurityError("the views of a dict are no operands")
        elif operator == "%":
            budget.allow(_formatted(budget, [left, right]) if isinstance(left, str) else 0)
        else:
            budget.allow((_product if operator == "*" else _sum)(budget, [left, right]))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether a template may reach ``obj.attr``."""
        return attr not in _UNSAFE_METHODS and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return ``obj[argument]``."""
        _budget.get().look()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a macro, a method or a function."""
        budget = _budget.get()
        budget.look()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(method, BuiltinMethodType) or isinstance(owner, str):  # Markup is in Python
            estimate = _METHODS.get(method.__name__, _product)
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
        return self.concat(
            encoder.iterencode(value)
        )  # piece by piece: deep values are mostly indent


def _bound_filter(function: Callable[..., Any], estimate: _Estimate) -> Callable[..., Any]:
    skipped = int(
        hasattr(function, "jinja_pass_arg")
    )  # the context or environment, before the operands

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.allow(estimate(budget, [*args[skipped:], *kwargs.values()]))
        result = budget.settle(function(*args, **kwargs))
        if estimate is not _nothing:
            budget.allow(budget.size(result))
        return result

    return bounded


def _watch_test(function: Any) -> Any:
    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        _budget.get().look()
        return function(*args, **kwargs)

    return watched


def _make_dict(source: Any = (), /, **kwargs: Any) -> dict[Any, Any]:
    """Do what ``dict`` does, item by item: keys with the same hash, which are easy to make, take quadratic time."""
    look = _budget.get().look
    made = {}
    for key, value in source.items() if isinstance(source, Mapping) else source:
        look()
        made[key] = value
    return made | kwargs


def _raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation, by the name that templates on the hub know."""
    raise jinja2.TemplateError(f"{message!s:.500}")
