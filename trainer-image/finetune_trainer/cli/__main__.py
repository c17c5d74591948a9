"""`python -m finetune_trainer.cli`."""

import sys

from finetune_trainer.cli.commands import main

sys.exit(main())
