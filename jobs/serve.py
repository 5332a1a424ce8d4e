"""`ray job submit --working-dir . -- python jobs/serve.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
