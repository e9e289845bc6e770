"""Train a recipe: `python train.py recipe=NAME [stages=[sla,rcm]] [any.key=value ...]`, alone or under `accelerate launch`."""

import sys

from turbotrain.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(sys.argv[1:]))
