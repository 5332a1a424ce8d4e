"""`ray job submit --working-dir . -- python jobs/plan.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["plan", *sys.argv[1:]]))
