"""`ray job submit --working-dir . -- python jobs/reward.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["reward", *sys.argv[1:]]))
