"""The case as one run, and data/, which came of one."""

import lazy_loader

# the names stand in __init__.pyi, where editors and type checkers read them too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
