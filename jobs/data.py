"""`ray job submit --working-dir . -- python jobs/data.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["data", *sys.argv[1:]]))
