"""`ray job submit --working-dir . -- python jobs/rounds.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["rounds", *sys.argv[1:]]))
