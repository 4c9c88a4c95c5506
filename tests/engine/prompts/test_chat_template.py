"""Chat templates: the sandbox, limits on time and memory, and transformers' rendering."""

import contextlib
import json
import subprocess
import sys
import threading
from functools import cache, wraps
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from transformers import LlamaTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from idefics2_engine.errors import ConfigError, PromptError
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts import template_budget
from idefics2_engine.prompts.chat_template import BUILT_IN_TEMPLATE, ChatTemplate
from idefics2_engine.prompts.messages import read_messages
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.prompts.template_budget import Budget
from idefics2_engine.prompts.template_sandbox import MAX_SOURCE
from idefics2_engine.prompts.tokenizer import Tokenizer
from paths import EIGHT_B

PUBLISHED = json.loads((EIGHT_B / "processor_config.json").read_text())["chat_template"]
HELLO: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}"
ENDS = "{% endfor %}{% endfor %}"
GROW = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(100) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
AGAIN = "{%% set x = %s %%}{%% for i in range(100000) %%}{%% if %s %%}{%% endif %%}{%% endfor %%}"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EIGHT_B)


def render(source: str, messages: list[dict[str, Any]] = HELLO, generate: bool = True) -> str:
    rendered = ChatTemplate(source, tokenizer()).render(messages, generate)
    return tokenizer().unmark(rendered)


TOO_LARGE = [
    "{{ 'a' * 10**9 }}",
    "{% set n = 10**9 %}{{ 'a' * n }}{{ n * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ (0,) * 10**9 }}",
    "{{ 10**(10**10) }}",
    "{{ 2**(10**9) }}",
    GROW % ("3", "ns.x * ns.x"),
    "{{ ('v' * 900000) | int(base=32) // (('v' * 450000) | int(base=32) + 1) }}",
    "{{ (2**16000) * (2**16000) * (2**16000) }}",
    # Formats
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:{}}'.format(1, '1000000000') }}",
    "{{ '{{{:{}}}}'.format(1, '1000000000') }}",
    "{{ '{0:{w}}'.format_map({'0': 1, 'w': 10**9}) }}",
    "{{ '{x:{y[0]}}'.format(x=1, y=['1000000000']) }}",
    "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 100000} }}",
    # Methods
    *(f"{{{{ 'a'.{name}(10**9) }}}}" for name in ("ljust", "rjust", "center", "zfill")),
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{{ ('a' * 100000).join(['b'] * 100000) }}",
    "{{ ''.join(range(100000) | map('center', 100000)) }}",
    "{{ ('a' * 1000000).strip('b' * 1000000 ~ 'a') }}",
    "{{ ('a' * 900000).rfind('b' ~ 'a' * 500000) }}",
    "{% autoescape true %}{% set x %}{{ 'a' * 100000 }}{% endset %}{{ x.join(['a'] * 100000) }}"
    "{% endautoescape %}",
    "{{ ('{:1000000000}' | safe).format(1) }}",
    "{{ ('a' | safe).ljust(10**9) }}",
    "{{ ('a' | safe) * 10**9 }}",
    "{{ ('%1000000000d' | safe) % 1 }}",
    # Filters
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ ('\n' * 100000) | indent('a' * 100000) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000) | replace(new='b' * 100000, old='a') }}",
    "{{ ('a' * 100000) | replace(count=100000, new='b' * 100000, old='a') }}",
    "{{ (['b'] * 100000) | join('a' * 100000) }}",
    "{{ range(100000) | join('a' * 100000) }}",
    "{{ range(100000) | map('center', 100000) | join }}",
    "{% set c = cycler(*(range(100000) | map('center', 100000))) %}",
    "{{ [1] | batch(10**9, 0) | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ [1] | tojson(indent='x' * 100000) }}",
    "{{ (range(100000) | list) | tojson(separators=('x' * 100000, ':')) }}",
    "{{ 42.55 | round(10**9, 'ceil') }}",
    "{{ ('nan' | float) | round(10**9, 'ceil') }}",
    "{{ ('inf' | float) | round(10**9, 'ceil') }}",
    "{{ ([[1]] * 30000) | sum(start=[]) }}",
    "{{ ([[1]] * 30000) | sum('0', []) }}",
    # Values that double in size
    GROW % ("'ab'", "ns.x ~ ns.x"),
    GROW % ("'ab'", "ns.x + ns.x"),
    GROW % ("[1]", "[ns.x, ns.x]"),
    GROW % ("(1,)", "(ns.x, ns.x)"),
    GROW % ("{}", "{'a': ns.x, 'b': ns.x}"),
    GROW % ("{}", "dict(a=ns.x, b=ns.x)"),
    # Large numbers of values
    "{% macro m() %}{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}{% endmacro %}{{ m() }}",
    "{% set x %}{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}{% endset %}",
    "{% filter upper %}{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}{% endfilter %}",
    "{% set ns = namespace(x=1) %}{% for i in range(100000) %}"
    "{% set ns.x = namespace(a=ns.x, b='a' * 100000 ~ i) %}{% endfor %}",
    f"{LOOPS}literal text of the template{ENDS}",
]
TOO_LONG = [
    f"{LOOPS}{ENDS}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}" + ENDS,
    f"{LOOPS}{{% if loop.index == 0 %}}{{% break %}}{{% endif %}}{ENDS}",
    f"{{% set x %}}{LOOPS}text{ENDS}{{% endset %}}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{% for i in [40] recursive %}{% if i %}{{ loop([i - 1, i - 1]) }}{% endif %}{% endfor %}",
    AGAIN % ("range(50000) | list", "x == (range(50000) | list)"),
    AGAIN % ("range(50000) | list", "x is eq(range(50000) | list)"),
    AGAIN % ("range(50000) | list", "'b' in x"),
    AGAIN % ("range(50000) | list", "x[1:] == 0"),
    AGAIN % ("range(50000) | list", "x | select('in', x) | first"),
    # Keys with the same hash: those of a dict, and tuples of these two numbers
    "{{ dict(range(0, 2305843009213693951 * 40000, 2305843009213693951) | batch(2)) }}",
    "{{ namespace(range(0, 2305843009213693951 * 40000, 2305843009213693951) | batch(2)) }}",
    "{{ range(0, 2305843009213693951 * 100000, 2305843009213693951) | unique | list | length }}",
    AGAIN % ("'x.' * 100000", "x | wordcount == 0"),
    AGAIN % ("'x.' * 100000", "x | urlencode | first"),
]


def set_clock(monkeypatch: pytest.MonkeyPatch, tick: float) -> None:
    """Advance time by ``tick`` seconds at each reading of the clock, and never otherwise.

    Time is thereby counted in readings.
    """
    seconds = count(0, tick)
    clocks = SimpleNamespace(monotonic=lambda: next(seconds), thread_time=lambda: next(seconds))
    monkeypatch.setattr(template_budget, "time", clocks)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock, so that only size limits or the end of the template stop a rendering."""
    set_clock(monkeypatch, 0)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow about 50 readings of the clock, so long operations must read it repeatedly."""
    set_clock(monkeypatch, 0.01)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("source", TOO_LARGE)
def test_size_is_limited(source: str) -> None:
    with pytest.raises(
        PromptError, match=r"TemplateLimitError: .* (size|bits) .*at most \d|at most \d+ bits"
    ):
        render(source)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("source", TOO_LONG)
def test_time_is_limited(source: str) -> None:
    with pytest.raises(PromptError, match=r"TemplateLimitError: must take at most 0.5 s"):
        render(source)


def test_memory_is_limited() -> None:
    """Large values are refused before they are created, so a process that tries all stays small."""
    code = """
import json, resource, sys
from pathlib import Path
from idefics2_engine.errors import PromptError
from idefics2_engine.prompts.chat_template import ChatTemplate
from idefics2_engine.prompts.tokenizer import Tokenizer

tokenizer = Tokenizer.load(Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for source in json.load(sys.stdin):
    try:
        ChatTemplate(source, tokenizer).render([{"role": "user", "content": []}], True)
    except PromptError:
        pass
print((peak() - before) // 1024)
"""
    command = [sys.executable, "-c", code, str(EIGHT_B)]
    done = subprocess.run(
        command, input=json.dumps(TOO_LARGE), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 128, "MiB"


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}", "RecursionError"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
        ("{{ range(10**9) }}", "OverflowError: Range too big"),
        ("{% for i in range(10**6) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ lipsum(n=10**6) }}", "'lipsum' is undefined"),
        ("{{ dict.fromkeys(range(100000), 'a') }}", "no attribute 'fromkeys'"),
        ("{{ {}.fromkeys(range(100000), 'a') }}", "attribute 'fromkeys' of 'dict' .* unsafe"),
        ("{{ {1: 2}.keys().isdisjoint([1]) }}", "attribute 'isdisjoint' .* unsafe"),
        ("{{ {1: 2}.keys() - [1] }}", "the views of a dict are no operands"),
        ("{{ ('é' * 100000).encode('punycode') }}", "attribute 'encode' of 'str' .* unsafe"),
        ("{{ (('<!---->' * 100000) | safe).striptags() }}", "attribute 'striptags' .* unsafe"),
        ("{{ (1).to_bytes(10**9, 'big') }}", "attribute 'to_bytes' of 'int' .* unsafe"),
        ("{{ raise_exception(2**16000) }}", "ValueError"),
        ("{{ ('9' * 100000) | int + 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_template_errors_become_prompt_errors(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=f"chat template: .*{message}"):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 << 10**9 }}", "line 1: unexpected '<'"),
        ("{{ 'a b' | wordwrap(1, true, 'x' * 10**9) }}", "No filter named 'wordwrap'"),
        ("{{ 'a' | bounded value }}", "expected token 'end of print statement'"),
        ("{{ ('<' * 1000000) | striptags }}", "No filter named 'striptags'"),
        ("a" * (MAX_SOURCE + 1), f"at most {MAX_SOURCE} characters"),
        ("{{a~a}}" * (MAX_SOURCE // 7), "at most 16384 nodes"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ " + "9" * 5000 + " }}", "ValueError"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "SyntaxError|IndentationError"),
    ],
    ids=lambda text: text[:40],
)
def test_invalid_templates_are_refused_at_load(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(source, tokenizer())


@pytest.mark.parametrize("source", [*TOO_LARGE, *TOO_LONG])
def test_loading_runs_no_filter(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja folds constants while it compiles, but must not compute ``'a' | center(10**9)``."""
    computed: list[str] = []

    def record_calls(name: str, compute: Any) -> Any:
        @wraps(compute)
        def note(*args: Any, **kwargs: Any) -> Any:
            computed.append(name)
            return compute(*args, **kwargs)

        return note

    for name, compute in DEFAULT_FILTERS.items():
        monkeypatch.setitem(DEFAULT_FILTERS, name, record_calls(name, compute))
    ChatTemplate(source, tokenizer())
    assert not computed


def test_printing_nested_objects_stays_short() -> None:
    for holder in ("namespace(a=ns.x, b=ns.x)", "cycler(ns.x, ns.x)"):
        assert len(render(GROW % ("1", holder) + "{{ ns.x }}{{ [ns.x] }}")) < 200


@pytest.mark.usefixtures("ticking")
def test_limits_hold_in_any_thread() -> None:
    template = ChatTemplate(f"{LOOPS}{ENDS}", tokenizer())
    errors: list[BaseException] = []

    def work() -> None:
        try:
            template.render(HELLO, True)
        except PromptError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["must take at most 0.5 s" in str(error) for error in errors] == [True] * 2


def test_each_thread_has_its_own_budget() -> None:
    template = ChatTemplate(f"{LOOPS}{ENDS}", tokenizer())

    def work() -> None:
        with pytest.raises(PromptError):
            template.render(HELLO, True)

    thread = threading.Thread(target=work)
    thread.start()
    assert render(BUILT_IN_TEMPLATE) == "User: hello<end_of_utterance>\nAssistant:"
    thread.join()


def test_time_of_a_suspended_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock runs while a machine is suspended, but the thread's own clock does not."""
    wall = count(0, 100)
    clocks = SimpleNamespace(monotonic=lambda: next(wall), thread_time=lambda: 0.0)
    monkeypatch.setattr(template_budget, "time", clocks)
    assert render(PUBLISHED) == "User: hello<end_of_utterance>\nAssistant:"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') | string }}",
    "{{ ['x'] | map(attribute='__class__') | first }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('' | attr('format'))('{0.__class__}') ~ ('{0.__class__}' | attr('format'))('') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ namespace({'__class__': 1}) }}",
    "{% set ns = namespace() %}{% set ns._Namespace__attrs = 1 %}",
    "{{ range.__globals__ }}",
    "{{ dict.__globals__ }}",
    "{{ dict.__call__.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ lipsum.__globals__['os'] }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].content.clear() }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% set messages[0] = 1 %}",
    "{% set messages.x = 1 %}",
    "{% set range.x = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import popen %}",
    "{% extends 'base' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}",
    "{% do messages.append(1) %}",
    "{% debug %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox_escapes_print_nothing(source: str) -> None:
    messages = json.loads(json.dumps(HELLO))
    with contextlib.suppress(PromptError, ConfigError):
        rendered = render(source, messages)
        assert not rendered.strip(), "what is unsafe is undefined, and prints nothing"
    assert messages == HELLO


def test_errors_are_short_and_show_no_marks() -> None:
    source = "{{ raise_exception('no ' ~ messages[0].content[0].text ~ 'a' * 100000) }}"
    message = [{"role": "user", "content": [{"type": "text", "text": "<b>"}]}]
    with pytest.raises(PromptError, match=r"^chat template: TemplateError: no <b>a{100,500}$"):
        render(source, message)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi", "chat_template": "forged"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi", "chat_template": "forged"}]}],
        [{"role": "user", "content": [{"type": "image", "chat_template": "forged"}]}],
        [{"chat_template": "forged"}],
        {"messages": [{"role": "user", "content": "hi"}], "chat_template": "forged"},
        [{"role": "system", "content": "hi"}, {"role": "chat_template", "template": "forged"}],
    ],
)
def test_template_in_a_conversation_is_refused(messages: Any) -> None:
    """Unknown keys are errors everywhere in a conversation, and so is a template among them."""
    processor = Processor.load(EIGHT_B, ModelConfig.load(EIGHT_B))
    with pytest.raises(PromptError, match="must be"):
        processor.chat(messages)


def test_typed_template_is_text() -> None:
    for text in (
        "{{ 1 + 1 }}",
        "{% for i in range(9) %}x{% endfor %}",
        "{# gone #}",
        "{{ bos_token }}",
    ):
        turns, _ = read_messages([{"role": "user", "content": text}])
        assert render(PUBLISHED, turns) == f"User: {text}<end_of_utterance>\nAssistant:"


CHATTY = """\
{% for message in messages %}{{ message['role'].capitalize() }}{% if message['content'][0]['type'] == 'image' %}\
{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}\
{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n\
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
HUB_STYLE = {
    "idefics2-8b": PUBLISHED,
    "chatty": CHATTY,
    "the built-in": BUILT_IN_TEMPLATE,
    "tools": """
        {%- if tools is not none and documents is defined %}{{ tools | tojson(indent=4) }}{%- endif %}
        {%- for m in messages %}
        {%- if m.content is string %}{{ m.content }}{%- else %}
        {{- m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') | trim }}
        {%- endif %}
        {%- endfor %}{{ bos_token ~ eos_token ~ unk_token ~ (pad_token or 'none') }}
    """,
    "namespace": """
        {%- set ns = namespace(last=-1, system='') %}
        {%- for m in messages %}
            {%- if m.role == 'system' %}{% set ns.system = m.content[0].text %}{% endif %}
            {%- if m['role'] != 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}
        {%- endfor %}
        {{- ns.system.strip().split('>')[-1].replace('a', 'bc') }}
        {%- for m in messages[1:] %}
            {%- if loop.first and not loop.last %}first of {{ loop.length }}{% endif %}
            {%- if (loop.index % 2 == 0) != (m.role == 'user') %}{{ '%s|%d' % (m.role, loop.revindex) }}{% endif %}
            {%- generation %}{{ m.content | tojson }}{{ '{}: {:>5}'.format(m.role, loop.index) }}{% endgeneration %}
            {%- if loop.index0 > ns.last %}{% break %}{% endif %}
        {%- else %}nothing{% endfor %}
    """,
    "macro": """
        {%- macro show(part, depth=2) -%}
            {%- if depth %}{{ show(part, depth - 1) | indent(depth) }}{% else %}
                {%- for key, value in part.items() | sort %}{{ key }}={{ value | upper }};{% endfor %}
            {%- endif %}
        {%- endmacro %}
        {{- show(messages[0].content[0]) }}
        {%- for group in messages | groupby('role') %}{{ group.grouper }}{{ group.list | length }}{% endfor %}
        {%- for row in range(5) | batch(2, 'x') %}{{ row | join(',') }}{% endfor %}
        {{- dict(a=1, **{'b': [1, 2, 3][::-1]}) }}{{ (1, 2) + (3,) }}{{ 7 // 2 ** 1 % 4 - 1 }}
        {{- messages | map(attribute='role') | unique | list | tojson(separators=(',', ':')) }}
        {{- [3, 1, 2] | sort(reverse=true) | first }}{{ 'x' if messages | rejectattr('role') else 'y' }}
        {{- 'a' in 'abc' and 1 < 2 <= 2 and none is none }}{{ 2.5 | round | int }}{{ '%05.1f' | format(1.25) }}
    """,
}  # fmt: skip


def conversations() -> list[list[dict[str, Any]]]:
    image = {"type": "image"}

    def text(text: str) -> dict[str, Any]:
        return {"type": "text", "text": text}

    return [
        HELLO,
        [{"role": "user", "content": [image, text("What?"), image, text("")]}],
        [
            {"role": "system", "content": [text("<be> a\nbrief ")]},
            {"role": "user", "content": [text("é漢🙂 <b>"), image]},
            {"role": "assistant", "content": [text("\n It is. ")]},
            {"role": "user", "content": [image, image, text('"quoted" & {{ braces }}')]},
            {"role": "assistant", "content": [text("Yes")]},
        ],
    ]


@cache
def special_tokens() -> dict[str, Any]:
    return dict(LlamaTokenizer.from_pretrained(EIGHT_B).special_tokens_map)


def render_with_transformers(source: str, messages: list[dict[str, Any]], generate: bool) -> str:
    rendered: Any = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=generate, **special_tokens()
    )
    return str(rendered[0][0])


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("name", HUB_STYLE)
def test_rendering_equals_transformers(name: str, generate: bool) -> None:
    for messages in conversations():
        # A template that searches typed text for "<" would find marks behind it. None of these
        # does.
        assert render(HUB_STYLE[name], messages, generate) == render_with_transformers(
            HUB_STYLE[name], messages, generate
        )


def test_list_of_templates_renders_as_in_transformers(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATTY}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.load(tmp_path, tokenizer())
    assert found is not None
    for messages in conversations():
        assert tokenizer().unmark(found.render(messages, False)) == render_with_transformers(
            CHATTY, messages, False
        )


@pytest.fixture
def clock_reads(monkeypatch: pytest.MonkeyPatch) -> list[Budget]:
    """Return a list that grows with each reading of the clock."""
    seen: list[Budget] = []
    monkeypatch.setattr(Budget, "look", lambda budget: seen.append(budget))
    return seen


@pytest.mark.parametrize("made", ["dict(pairs)", "namespace(pairs)"])
def test_keys_are_inserted_one_by_one(made: str, clock_reads: list[Budget]) -> None:
    """With equal hashes, inserting all keys at once takes quadratic time between two clock reads."""
    pairs = "{% set pairs = range(2000) | map('string') | batch(2) | list %}"
    render(pairs)
    before = len(clock_reads)
    clock_reads.clear()
    render(f"{pairs}{{% set made = {made} %}}")
    assert len(clock_reads) - before >= 1000


def test_work_grows_with_the_conversation(clock_reads: list[Budget]) -> None:
    """Each operation reads the clock, so every message needs the same number of readings."""
    question = {"type": "text", "text": "What is in this image, and where is the star?"}
    turns = [
        {"role": "user", "content": [{"type": "image"}, question]},
        {"role": "assistant", "content": [question]},
    ]
    for source in (PUBLISHED, BUILT_IN_TEMPLATE):
        template = ChatTemplate(source, tokenizer())
        taken = []
        for times in (1, 2, 200):
            clock_reads.clear()
            template.render(turns * times, True)
            taken.append(len(clock_reads))
        one, two, many = taken
        assert many == one + 199 * (two - one)
        assert 0 < two - one < 100


@pytest.mark.usefixtures("still")
def test_long_conversations_fit_the_limits() -> None:
    for turns, length in ((1, 1_000_000), (2000, 100), (300, 10_000)):
        turn = {"role": "user", "content": [{"type": "text", "text": "<b>" + "a" * length}]}
        assert len(render(PUBLISHED, [turn] * turns)) > turns * length
        assert len(render(HUB_STYLE["tools"], [turn] * turns)) > turns * length
