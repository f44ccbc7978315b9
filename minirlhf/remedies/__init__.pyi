from .arms import ARMS as ARMS
from .arms import FAULTS as FAULTS
from .arms import REMEDIES as REMEDIES
from .arms import Remedy as Remedy
from .arms import stack as stack
