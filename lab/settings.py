"""A flat dataclass of parameters: presets, types, and clear words for what cannot work."""

import difflib
import math
from dataclasses import field, fields

from lab import CourseError


def knob(default, stages, meaning):
    """A field: its default, the stages that read it, what it means."""
    return field(default=default, metadata={"stages": stages.split(), "meaning": meaning})


class Settings:
    """Base of a dataclass made of knobs. None means "as the preset says"."""

    presets = {}
    may_be_zero = frozenset()  # whole numbers that need not be at least 1
    one_of = {}  # the words that a text may be

    def __init__(self, preset="auto", **values):
        preset, known = preset or "auto", {f.name: f for f in fields(self)}
        if preset not in ("auto", *self.presets):
            raise CourseError(f"preset = {preset!r} is not known{nearest(preset, self.presets)}")
        for name in values:
            if name not in known:
                raise CourseError(f"{name!r} is not a parameter{nearest(name, known)}")
        given = {name: value for name, value in values.items() if value is not None}
        merged = {name: f.default for name, f in known.items()} | self.presets.get(preset, {})
        merged |= self.implied(merged | given) | given | {"preset": preset}
        for name, f in known.items():
            object.__setattr__(self, name, converted(name, merged[name], f.type))
            self.check_size(name, f.type)
        for name, words in self.one_of.items():
            if (value := getattr(self, name)) not in words:
                raise CourseError(f"{name} = {value!r} is not known{nearest(value, words)}")
        self.check()

    def changed(self, **values):
        """The same parameters but for those that are given."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self)} | values)

    @staticmethod
    def implied(values):
        """More defaults, which follow from other values."""
        return {}

    def check_size(self, name, kind):
        value, floor = getattr(self, name), 0 if name in self.may_be_zero else 1
        if kind is int and value < floor:
            raise CourseError(f"{name} = {value} is impossible: it must be at least {floor}.")
        if kind is float and not 0 <= value < math.inf:
            raise CourseError(f"{name} = {value} is impossible: it must be at least 0, and finite.")

    def check(self):
        """For what only the subclass knows."""


def nearest(name, known):
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}."


def converted(name, value, kind):
    """The value as its field's type: YAML and the command line hand over 2e-5 as text."""
    try:
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind is str and isinstance(value, str):
            return value
        number = kind in (int, float) and not isinstance(value, bool)
        if number and (kind is float or isinstance(value, int) or kind(value) == float(value)):
            return kind(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise CourseError(f"{name} = {value!r} is impossible: it must be of type {kind.__name__}.")
