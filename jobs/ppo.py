"""`ray job submit --working-dir . -- python jobs/ppo.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["ppo", *sys.argv[1:]]))
