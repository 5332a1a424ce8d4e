"""`ray job submit --working-dir . -- python jobs/corpus.py RECIPE [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["corpus", *sys.argv[1:]]))
