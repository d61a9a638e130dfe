"""Networks. A module that registers a task (see ``tasks.task.task``) is all that a task needs."""
