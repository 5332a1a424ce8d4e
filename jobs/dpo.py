"""`ray job submit --working-dir . -- python jobs/dpo.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["dpo", *sys.argv[1:]]))
