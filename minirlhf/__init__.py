"""minirlhf: watch a support assistant drift after RLHF, take the batch apart, and repair it.

Import what you need from its module (`from minirlhf.kl import kl_k1`): nothing is imported here,
so that a step loads only what it uses.
"""

__version__ = "0.1.0"
