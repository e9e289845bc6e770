"""What `train.py` delegates to: exit status 0 done, 1 failed (one line on stderr), 2 usage."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from turbotrain.compose import UsageError
from turbotrain.config import load_config
from turbotrain.recipe import run_recipe

DONE, FAILED, USAGE = 0, 1, 2


def train_main(arguments: Sequence[str]) -> int:
    """Compose, validate, run."""
    debug = "debug=true" in [argument.lower() for argument in arguments]
    try:
        run_recipe(load_config(arguments))
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = "usage" if isinstance(error, UsageError) else "failed"
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{kind}: {reason}" + ("" if debug else "  (debug=true shows the traceback)"), file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    return DONE
