"""`ray job submit --working-dir . -- python jobs/label.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["label", *sys.argv[1:]]))
