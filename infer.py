"""Prompt in, video out: `python infer.py checkpoint=PATH prompt='a cat on a boat' [steps=4] [seed=0] [output=out.mp4]`.

Also `mode=evaluate` and `mode=benchmark`; `python infer.py --help` lists every key. Exit status: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import sys

from turbotrain.inference import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
