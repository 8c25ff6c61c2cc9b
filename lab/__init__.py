"""The tools around the course: data, the world, runs, reports. The lessons are in util.py."""


class CourseError(Exception):
    """An error that the user can fix. It is shown as one sentence, without a traceback."""

    def _render_traceback_(self):  # what Jupyter shows in place of a traceback
        return [f"{type(self).__name__}: {self}"]
