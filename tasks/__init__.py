"""Second floor: tasks on any backbone that yields a feature pyramid, one folder each behind one `Task` record.

`TASKS` has the records by name. Another project adds its own by an entry point of the group ``evmamba.tasks``, or by
one call: ``evmamba.tasks.register(TASK)``.
"""

from evmamba.tasks.classification import TASK as _CLASSIFICATION
from evmamba.tasks.detection import TASK as _DETECTION
from evmamba.tasks.record import Embedded, Head, Metric, Option, Task
from evmamba.tasks.registry import Registry
from evmamba.tasks.segmentation import TASK as _SEGMENTATION

TASKS = Registry([_CLASSIFICATION, _DETECTION, _SEGMENTATION])
register = TASKS.register

__all__ = ["TASKS", "Embedded", "Head", "Metric", "Option", "Task", "register"]
