"""`ray job submit --working-dir . -- python jobs/evaluate.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
