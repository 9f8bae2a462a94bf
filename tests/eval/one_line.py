"""A command for tests of what runs commands: it runs the line of Python that it is given."""

import sys

if __name__ == "__main__":
    __doc__ = sys.argv[1]
    exec(__doc__)
