"""What the keeper starts. SGLang's processes import this module first, as multiprocessing has it; ``__main__.py`` they would not."""

import sys

from procs.engine import imports

imports.hold_collector()

if __name__ == "__main__":
    from procs.engine.__main__ import main

    sys.exit(main())
