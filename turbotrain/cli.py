"""What `train.py` delegates to, and the commands of an installed package. Exit status 0 done, 1 failed (one line on stderr), 2
usage."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from turbotrain.compose import UsageError, recipe_names
from turbotrain.config import STAGES, load_config
from turbotrain.recipe import run_recipe

DONE, FAILED, USAGE = 0, 1, 2
USAGE_TEXT = """usage: python train.py recipe=NAME [stages=[sla,rcm]] [group=choice ...] [any.key=value ...]

  recipe        {recipes}
  stages        {stages}
  dry_run=true  show what would run, on which inputs, and the network's size; write nothing
  debug=true    show tracebacks

Results go to output_dir/name (outputs/<recipe>). The same command continues an interrupted run and skips what is done.
Groups and keys: configs/, turbotrain/config.py."""


def train_main(arguments: Sequence[str]) -> int:
    """Compose, validate, run; `--help` lists the recipes."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(USAGE_TEXT.format(recipes=", ".join(recipe_names()), stages=", ".join(STAGES)))
        return DONE
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


def train_command() -> None:
    """`turbotrain-train`, for users who installed the package instead of cloning it."""
    sys.exit(train_main(sys.argv[1:]))


def infer_command() -> None:
    """`turbotrain-infer`, likewise."""
    from turbotrain.inference import main

    sys.exit(main(sys.argv[1:]))
