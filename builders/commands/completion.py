"""`deepseek-triton completion`: a bash script that completes commands, options and their values."""

from __future__ import annotations

import argparse

SCRIPT = """\
_deepseek_triton() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    case "$COMP_CWORD:${{COMP_WORDS[1]}} $before" in
        1:*) words="{commands}" ;;
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _deepseek_triton {program}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing but how to use it."""
    parser.epilog = 'Use it with: eval "$(deepseek-triton completion)", in ~/.bashrc for every shell.'


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    from deepseek_triton.builders.commands.table import COMMANDS, PROGRAM, make_command_parser

    cases = []
    for name in COMMANDS:
        actions = [one for one in make_command_parser(name)._actions if one.help != argparse.SUPPRESS]
        for action in actions:
            if action.choices and action.option_strings:
                pattern = f'*":{name} {action.option_strings[-1]}"'
                cases.append(f'        {pattern}) words="{" ".join(map(str, action.choices))}" ;;')
        options = " ".join(option for action in actions for option in action.option_strings if option.startswith("--"))
        cases.append(f'        *":{name} "*) words="{options}" ;;')
    print(SCRIPT.format(commands=" ".join(COMMANDS), cases="\n".join(cases), program=PROGRAM))
    return 0
