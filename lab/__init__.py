"""The equipment around the course: data, world, runs, reports. Nothing here is taught."""


class CourseError(Exception):
    """Something the person in front of the screen can mend: one sentence, no traceback."""

    def _render_traceback_(self):  # what Jupyter shows in place of a traceback
        return [f"{type(self).__name__}: {self}"]
