"""The routes: what questions there can be, told by examples that an operator edits; a bad file is refused with the line that is wrong."""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Self, get_args

from pydantic import StringConstraints, ValidationError, field_validator, model_validator

from capibara_flow.domain.toml_lines import lines_of, nearest
from topics.chat import Complexity
from topics.message import Part

#: The route of what belongs to none: no route of a file may bear its name.
DEFAULT = "default"
LEVELS: tuple[Complexity, ...] = get_args(Complexity)

#: A level with fewer examples cannot be learned.
FEWEST = 8

#: Examples that a file may hold: learning takes time with their number's third power.
MOST_EXAMPLES = 4000

Example = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Position = tuple[str | int, ...]


class Levels(Part):
    """Examples by how much they ask for."""

    simple: tuple[Example, ...] = ()
    moderate: tuple[Example, ...] = ()
    complex: tuple[Example, ...] = ()
    very_complex: tuple[Example, ...] = ()

    def at(self, level: Complexity) -> tuple[str, ...]:
        """The examples of *level*."""
        return {"simple": self.simple, "moderate": self.moderate, "complex": self.complex, "very_complex": self.very_complex}[level]


class Route(Part):
    """One kind of question; *examples* may also be told apart by complexity (*levels*) or by what they are about (*topics*).

    Examples of one topic or level are alike; a route whose examples are of many sorts is learned better when its topics are named.
    """

    name: Name
    description: str = ""
    examples: tuple[Example, ...] = ()
    levels: Levels = Levels()
    topics: dict[Name, tuple[Example, ...]] = {}

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name == DEFAULT:
            raise ValueError(f"{DEFAULT!r} is the route of what belongs to none: give such examples under [none]")
        return name

    @model_validator(mode="after")
    def _has_examples(self) -> Self:
        if not any(examples for _, examples in self.groups):
            raise ValueError("a route needs examples")
        return self

    @property
    def groups(self) -> tuple[tuple[Position, tuple[str, ...]], ...]:
        """Its examples in groups of their own kind, each with its place in the route."""
        levels: tuple[tuple[Position, tuple[str, ...]], ...] = tuple((("levels", level), self.levels.at(level)) for level in LEVELS)
        topics: tuple[tuple[Position, tuple[str, ...]], ...] = tuple((("topics", topic), texts) for topic, texts in self.topics.items())
        return ((("examples",), self.examples), *levels, *topics)


class Nothing(Part):
    """Examples of what belongs to no route."""

    examples: tuple[Example, ...] = ()


class Labelled(Part):
    """One example: its *route*, the *group* of alike ones that it stands in, and its complexity where that is told."""

    text: str
    route: str
    group: str
    level: Complexity | None = None


class Routes(Part):
    """All routes of a file; *cues* are regular expressions by name that point to what is asked for.

    Cues are looked for in small letters without accents; which route a cue speaks for is learned from the examples.
    """

    cues: dict[Name, str] = {}
    routes: tuple[Route, ...]
    none: Nothing = Nothing()

    @field_validator("cues")
    @classmethod
    def _compile(cls, cues: dict[str, str]) -> dict[str, str]:
        for name, pattern in cues.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise _At((name,), f"{name} is not a regular expression: {error}") from error
        return cues

    @model_validator(mode="after")
    def _are_told_apart(self) -> Self:
        if not self.routes:
            raise _At(("routes",), "there are none")
        owners: dict[str, str] = {}
        for place, example in self._placed():
            if owners.setdefault(example.text.lower(), example.route) != example.route:
                raise _At(place, f"the same example for {owners[example.text.lower()]} and {example.route}")
        if len(owners) > MOST_EXAMPLES:
            raise ValueError(f"{len(owners)} examples are too many to learn from quickly, the limit is {MOST_EXAMPLES}")
        names = [route.name for route in self.routes]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _At(("routes", index, "name"), f"a second route called {name!r}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The routes, and last that of none."""
        return (*(route.name for route in self.routes), DEFAULT)

    @property
    def labelled(self) -> tuple[Labelled, ...]:
        """Every example once, in the order of the file."""
        return tuple({example.text.lower(): example for _, example in self._placed()}.values())

    @property
    def tells_complexity(self) -> bool:
        """Whether there are examples enough of every level to learn complexity from; otherwise others have to teach it."""
        levels = [each.level for each in self.labelled]
        return all(levels.count(level) >= FEWEST for level in LEVELS)

    def _placed(self) -> Iterator[tuple[Position, Labelled]]:
        for index, route in enumerate(self.routes):
            for place, texts in route.groups:
                level = next((each for each in LEVELS if place == ("levels", each)), None)
                for number, text in enumerate(texts):
                    group = f"{route.name}/{'/'.join(map(str, place))}"
                    yield ("routes", index, *place, number), Labelled(text=text, route=route.name, group=group, level=level)
        for number, text in enumerate(self.none.examples):
            yield ("none", "examples", number), Labelled(text=text, route=DEFAULT, group=DEFAULT)


class _At(ValueError):
    """What is wrong at *place*, seen from the validated thing."""

    def __init__(self, place: Position, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def parse_routes(text: str, name: str) -> Routes:
    """The routes that *text*, TOML, tells of; raises ``ValueError`` as ``NAME:LINE: key: reason``, one line for each problem."""
    try:
        raw: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, line = str(error), max(1, len(text.splitlines()))
        if found := re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", reason):
            reason, line = reason[: found.start()], int(found[1] or line)
        raise ValueError(f"{name}:{line}: not TOML: {reason}") from error
    try:
        return Routes.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        lines = lines_of(text)
        raise ValueError("\n".join(f"{name}:{line}: {key}: {reason}" for line, key, reason in _problems(error, lines))) from None


def _problems(error: ValidationError, lines: dict[Position, int]) -> Iterator[tuple[int, str, str]]:
    """Where, under which key and why, for everything that is wrong."""
    for each in error.errors():
        cause = each.get("ctx", {}).get("error")
        place: Position = (*each["loc"], *(cause.place if isinstance(cause, _At) else ()))
        yield nearest(lines, place) or 1, ".".join(map(str, place)) or "file", each["msg"].removeprefix("Value error, ")
