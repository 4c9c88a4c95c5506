"""The page of all options, from the parser of the command line."""

import argparse
from collections.abc import Iterator
from textwrap import fill

from idefics2_engine.cli.command import build_parser

_HEAD = """\
# Command line reference

Every command with its options, as `idefics2 COMMAND --help` has them. `make docs-generate` writes
this page from the parser. [cli.md](../cli.md) says how the commands are used. All commands have
`-v` and `--log-level`.
"""
# The same for every command
_LEFT_OUT = {"help", "log_level"}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by its name."""
    found = next(
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(found)


def option_page() -> str:
    """Return the page ``docs/reference/command-line.md``."""
    return "\n".join([_HEAD, *(line for name in commands() for line in _command(name))])


def _command(name: str) -> Iterator[str]:
    parser = commands()[name]
    yield f"## {name}\n"
    yield f"{_paragraph(parser.description or '')}\n"
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.dest not in _LEFT_OUT]
        if actions:
            yield f"| {(group.title or '').removeprefix('positional ')} | |\n|---|---|"
            yield from (_row(action) for action in actions)
            yield ""
    _, found, exit_codes = (parser.epilog or "").partition("exit codes: ")
    if found:
        codes = exit_codes.strip().rstrip(".")
        yield f"{_paragraph(f'Exit codes: {codes}.')}\n"


def _row(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices and not action.metavar:
        value = f"{{{','.join(map(str, action.choices))}}}"
    if action.nargs == 0:
        value = ""
    # A bar would end the cell
    title = f"{', '.join(action.option_strings)} {value}".strip().replace("|", " or ")
    text = (action.help or "") % {"default": action.default}
    return f"| `{title}` | {_cell(text)} |"


def _paragraph(text: str) -> str:
    return fill(_cell(" ".join(text.split())), 100, break_long_words=False, break_on_hyphens=False)


def _cell(text: str) -> str:
    """Return a text in which nothing is taken for markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
