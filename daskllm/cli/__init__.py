"""The command line: ``daskllm demo | generate | plan | bench | info`` and ``python -m daskllm``.

Owns what a terminal needs: options, progress, tables on the screen, one clear line and exit status 2 for a
bad call, and with ``--json`` one JSON line last. What it runs are the public calls that a notebook makes.
"""

from __future__ import annotations

import click

from daskllm import __version__
from daskllm.cli.answer import demo, generate
from daskllm.cli.look import info, plan
from daskllm.cli.measure import bench

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """A table of prompts in, a table of answers out."""


for command in (demo, generate, plan, bench, info):
    main.add_command(command)
