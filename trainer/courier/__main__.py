"""One rank's courier: ``python -m sidecast.trainer.courier DESCRIPTOR``."""

import sys

from sidecast.trainer.courier.process import main

if __name__ == "__main__":
    main(int(sys.argv[1]))
