"""A library that ends the process that reads it, where that is not the tests' own."""

import os
import sys

if "pytest" not in sys.modules:
    os._exit(1)
