"""`python -m finetune_trainer.worker --run-file FILE --work WORK`."""

import sys

from finetune_trainer.worker.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
