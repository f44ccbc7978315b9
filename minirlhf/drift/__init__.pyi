from .batches import kinds as kinds
from .config import DriftConfig as DriftConfig
from .data import DIALS as DIALS
from .data import Shipped as Shipped
from .data import shipped as shipped
from .recipe import Recipe as Recipe
from .recipe import changed as changed
from .run import Drift as Drift
