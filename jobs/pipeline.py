"""`ray job submit --working-dir . -- python jobs/pipeline.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["pipeline", *sys.argv[1:]]))
