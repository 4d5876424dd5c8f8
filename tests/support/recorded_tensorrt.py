"""A Python module of TensorRT that offers what a real one was recorded to offer, and nothing else.

Calls are checked against the recorded signatures: names and number of arguments, their kinds, properties that cannot be
set. What a call gives is of the recorded kind: true, zero, an empty list, or an object; a test puts in what it needs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

_SIGNATURE = re.compile(r"^\((?P<arguments>.*)\) -> (?P<gives>.+)$")
#: commas between arguments: not those inside brackets
_COMMA = re.compile(r",\s(?![^\[<]*[\]>])")
_PLAIN: dict[str, Any] = {"None": None, "bool": True, "int": 0, "str": "text", "List[str]": [], "list[str]": []}
_NUMBERS = ("int", "SupportsInt", "float", "SupportsFloat")


class _Sealed(type):
    """Classes whose instances have the attributes that were recorded, and no others."""

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"{cls.__name__}.{name} is not in {cls.origin}")  # type: ignore[attr-defined]


class RecordedTensorRT(ModuleType):
    """The module.

    Args:
        name, entry: of the record.
        null: classes that cannot be made, as where the library finds no driver.

    Attributes:
        gives: ``Class.attribute`` -> what a call or property gives: a value, or a function of the object and arguments.
        touched: names of classes, attributes and members that were used.
    """

    def __init__(self, name: str, entry: dict[str, Any], null: tuple[str, ...] = ()) -> None:
        super().__init__(name.partition(" ")[0].replace("-", "_"))
        self.origin, self.null = name, null
        self.__version__ = name.partition(" ")[2]
        self.gives: dict[str, Any] = {}
        self.touched: set[str] = set()
        self._kinds = {kind: self._make(kind, offers) for kind, offers in entry["classes"].items()}

    def __getattr__(self, name: str) -> Any:
        kinds = self.__dict__.get("_kinds", {})
        if name not in kinds:
            raise AttributeError(f"{name} is not in {self.__dict__.get('origin')}")
        self.touched.add(name)
        return kinds[name]

    def make(self, kind: str, **fields: Any) -> Any:
        """An object of a class; ``fields`` are what its properties or calls give."""
        made = object.__new__(self._kinds[kind])
        made.__dict__.update(fields)
        return made

    def _make(self, kind: str, offers: dict[str, Any]) -> Any:
        if "members" in offers:
            return self._enum(kind, offers["members"])
        space: dict[str, Any] = {"origin": self.origin, "recorded": self}
        for name, called in offers["attributes"].items():
            if called.partition(" ")[0] in ("get", "set"):
                space[name] = self._property(kind, name, called)
            else:
                space[name] = self._method(kind, name, called)

        def refuse(made: Any, name: str, value: Any) -> None:
            owner = inspect.getattr_static(type(made), name, None)
            if owner is None and type(made).__dict__.get("recorded") is self:
                raise AttributeError(f"{kind}.{name} cannot be set in {self.origin}")
            object.__setattr__(made, name, value)

        space["__setattr__"] = refuse
        return _Sealed(kind, (), space)

    def _enum(self, kind: str, members: list[str]) -> Any:
        recorded = self

        class Enum(_Sealed):
            def __getattribute__(cls, name: str) -> Any:
                if name in members:
                    recorded.touched.add(name)
                return super().__getattribute__(name)

        space: dict[str, Any] = {"origin": self.origin, "__int__": lambda made: made.value}
        made = Enum(kind, (), space)
        for number, member in enumerate(members):
            value = made()
            value.name, value.value = member, number
            type.__setattr__(made, member, value)
        return made

    def _property(self, kind: str, name: str, called: str) -> property:
        access, _, gives = called.rpartition(" ") if not called.endswith("et") else (called, "", "")

        def read(made: Any) -> Any:
            self.touched.add(name)
            if f"_{name}" in made.__dict__:
                return made.__dict__[f"_{name}"]
            return self._given(kind, name, made, (), gives)

        def write(made: Any, value: Any) -> None:
            self.touched.add(name)
            assert gives not in self._kinds or isinstance(value, self._kinds[gives]), f"{kind}.{name} = {value!r}"
            made.__dict__[f"_{name}"] = value

        return property(read if "get" in access else None, write if "set" in access else None)

    def _method(self, kind: str, name: str, called: str) -> Callable[..., Any]:
        overloads = [_parsed(text) for text in called.split("; ") if text]

        def call(made: Any, *arguments: Any, **named: Any) -> Any:
            self.touched.add(name)
            if name == "__init__":
                if kind in self.null:
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                if not overloads:
                    raise TypeError(f"{kind}: no constructor defined in {self.origin}")
            assert overloads or name.startswith("add_"), f"how {kind}.{name} is called was not recorded"
            problems = []
            for signature, gives in overloads:
                if problem := self._misfit(signature, arguments, named):
                    problems.append(problem)
                    continue
                return None if name == "__init__" else self._given(kind, name, made, arguments, gives)
            raise TypeError(f"{kind}.{name} of {self.origin}: {'; '.join(problems)}")

        return call

    def _misfit(self, signature: inspect.Signature, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
        try:
            bound = signature.bind(*arguments, **named)
        except TypeError as error:
            return str(error)
        for name, value in bound.arguments.items():
            wanted = signature.parameters[name].annotation
            if not self._fits(value, wanted) and not (value is None and signature.parameters[name].default is None):
                return f"{name} is {value!r}; {wanted} was expected"
        return ""

    def _fits(self, value: Any, wanted: str) -> bool:
        if wanted in self._kinds:
            return isinstance(value, self._kinds[wanted])
        if wanted in _NUMBERS:
            return isinstance(value, int)
        if wanted in ("buffer", "Buffer"):
            return bool(memoryview(value).nbytes >= 0)
        plain = {"str": str, "bool": bool, "tuple": tuple, "list": list, "Dims": (tuple, list)}.get(wanted)
        return plain is not None and isinstance(value, plain)

    def _given(self, kind: str, name: str, made: Any, arguments: tuple[Any, ...], gives: str) -> Any:
        if name in made.__dict__:
            held = made.__dict__[name]
            return held(*arguments) if callable(held) else held
        if f"{kind}.{name}" in self.gives:
            held = self.gives[f"{kind}.{name}"]
            return held(made, *arguments) if callable(held) else held
        if gives in _PLAIN:
            return _PLAIN[gives]
        assert gives in self._kinds, f"{kind}.{name} gives {gives!r}: tell the test what"
        return self.make(gives)


def _parsed(text: str) -> tuple[inspect.Signature, str]:
    found = _SIGNATURE.match(text)
    assert found, text
    parameters = []
    for argument in filter(None, _COMMA.split(found["arguments"])):
        head, _, default = argument.partition(" = ")
        name, _, kind = head.partition(": ")
        none = {"None": None}.get(default, default)
        preset = {"default": none} if default else {}
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, **preset))
    return inspect.Signature(parameters), found["gives"]
