"""One PPO batch taken apart, wherever it came from."""

import lazy_loader

# the names stand in __init__.pyi, where editors and type checkers read them too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
