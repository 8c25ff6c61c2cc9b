"""The base of a flat dataclass of parameters: presets, type conversion and clear errors."""

import difflib
import math
from dataclasses import field, fields

from lab import CourseError


def knob(default, stages, meaning):
    """Returns a dataclass field with a default, the stages that read it and its meaning."""
    return field(default=default, metadata={"stages": stages.split(), "meaning": meaning})


class Settings:
    """The base of a dataclass of knobs. A value of None leaves the preset's value."""

    presets = {}
    may_be_zero = frozenset()  # integers that may be 0; all others must be at least 1
    one_of = {}  # the allowed words of a text parameter

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
        """Returns a copy with some values replaced."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self)} | values)

    @staticmethod
    def implied(values):
        """Returns defaults that depend on other values."""
        return {}

    def check_size(self, name, kind):
        value, floor = getattr(self, name), 0 if name in self.may_be_zero else 1
        if kind is int and value < floor:
            raise CourseError(f"{name} = {value} is impossible: it must be at least {floor}.")
        if kind is float and not 0 <= value < math.inf:
            raise CourseError(f"{name} = {value} is impossible: it must be finite and at least 0.")

    def check(self):
        """Checks rules between parameters; subclasses override it."""


def nearest(name, known):
    """Returns the end of an error sentence: the most similar known name, or all of them."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from: {', '.join(known)}."


def converted(name, value, kind):
    """Converts a value to the type of its field: YAML and the command line pass 2e-5 as text."""
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
