"""`ray job submit --working-dir . -- python jobs/doctor.py [RECIPE] [key.sub=value ...]`."""

import sys

from rayrlhf.cli import main

sys.exit(main(["doctor", *sys.argv[1:]]))
