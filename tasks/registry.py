"""Which tasks there are: those of this project, those of installed packages, those that a module registers."""

import os
from collections.abc import Iterable, Iterator
from importlib import metadata

from evmamba.errors import UserError, unknown_name
from evmamba.tasks.own_modules import import_own
from evmamba.tasks.record import Task
from evmamba.tasks.trust import trust

ENTRY_POINTS = "evmamba.tasks"
# Modules to be imported first, with commas between them: processes that a command starts have it from their parent.
IMPORTS_VARIABLE = "EVMAMBA_IMPORT"


class Registry:
    """Tasks by name, in the order of registration; an unknown name is one line for the user.

    Others' tasks are looked for once, when somebody asks for the first time: entry points of the group
    ``evmamba.tasks`` that name a `Task`, and modules named by `import_modules`, which call `register`.
    """

    def __init__(self, own: Iterable[Task]) -> None:
        self._tasks: dict[str, Task] = {}
        self._complete = False
        for task in own:
            self.register(task)

    def register(self, task: Task) -> None:
        """Add a task; the same one may be added again.

        Raises:
            UserError: another task has its name or one of its heads.
        """
        known = self._tasks.get(task.name)
        if known is not None and known != task:
            raise UserError(f"there are two tasks '{task.name}': {known.module} and {task.module}; rename one")
        for other in self._tasks.values():
            shared = {head.key for head in task.heads} & {head.key for head in other.heads}
            if shared and other.name != task.name:
                raise UserError(f"the tasks {other.name} and {task.name} both have a head '{min(shared)}'; rename one")
        trust([task.module.split(".")[0]])  # it is imported: its module has run already
        self._tasks[task.name] = task

    def __getitem__(self, name: str) -> Task:
        self.find()
        if name not in self._tasks:
            raise unknown_name("task", name, self._tasks)
        return self._tasks[name]

    def __contains__(self, name: object) -> bool:
        self.find()
        return name in self._tasks

    def __iter__(self) -> Iterator[str]:
        self.find()
        return iter(list(self._tasks))

    def __len__(self) -> int:
        self.find()
        return len(self._tasks)

    def values(self) -> list[Task]:
        self.find()
        return list(self._tasks.values())

    def starts_others(self, name: str) -> bool:
        """Whether other tasks start from this one's trained backbone."""
        return any(task.starts_from == name for task in self.values())

    def of_head(self, key: str) -> Task:
        """Return the task that has a head.

        Raises:
            UserError: no task has.
        """
        for task in self.values():
            if any(head.key == key for head in task.heads):
                return task
        raise unknown_name("head", key, (head.key for task in self.values() for head in task.heads))

    def find(self) -> None:
        """Look for others' tasks, if nobody has asked yet; recipes and checkpoints may name their modules then."""
        if self._complete:
            return
        self._complete = True  # first: what is imported below may ask for tasks
        for point in metadata.entry_points(group=ENTRY_POINTS):
            try:
                self.register(point.load())
            except (ImportError, AttributeError) as error:
                raise UserError(f"the task '{point.name}' of an installed package cannot be loaded: {error}") from error
        for module in _named():
            trust([module])
            import_own(module, f"{IMPORTS_VARIABLE} names it")


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register tasks (or models in timm), here and in every process that is started from here.

    Raises:
        UserError: there is no such module where the command was given, or installed.
    """
    for name in names:
        trust([name])
        import_own(name, "--import names it")
        os.environ[IMPORTS_VARIABLE] = ",".join(dict.fromkeys([*_named(), name]))


def _named() -> list[str]:
    return [name for name in os.environ.get(IMPORTS_VARIABLE, "").split(",") if name]
