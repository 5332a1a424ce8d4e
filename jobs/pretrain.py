"""`ray job submit --working-dir . -- python jobs/pretrain.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["pretrain", *sys.argv[1:]]))
