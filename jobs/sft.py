"""`ray job submit --working-dir . -- python jobs/sft.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["sft", *sys.argv[1:]]))
