"""What the command-line tools share: usage errors and failures on one line, exit status 0 done, 1 failed, 2 usage."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from turbotrain.compose import UsageError

DONE, FAILED, USAGE = 0, 1, 2


class Parser(argparse.ArgumentParser):
    """Usage errors on one line, like those of train.py and infer.py."""

    def error(self, message: str) -> NoReturn:
        print(f"usage: {message}  (--help lists the options)", file=sys.stderr)
        sys.exit(USAGE)


def run(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The command's exit status; its errors become one line on stderr, usage or not (`options.debug`: with the traceback)."""
    try:
        return command(options)
    except KeyboardInterrupt:
        print("interrupted: no file is half written", file=sys.stderr)
    except (ValueError, OSError) as error:
        if options.debug:
            traceback.print_exc()
        kind, status = ("usage", USAGE) if isinstance(error, UsageError) else ("failed", FAILED)
        print(f"{kind}: {' '.join(str(error).split())}", file=sys.stderr)
        return status
    return FAILED
